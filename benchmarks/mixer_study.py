"""What the linear mixers start from and are made of: variants side by side, with one set of softmax layers.

    python benchmarks/study_rows.py CONFIG.yaml rows.npz
    python benchmarks/mixer_study.py CONFIG.yaml --rows rows.npz --records mixers.jsonl --layers 0 1 8 17 18 20 23 24
    python benchmarks/study_tables.py --mixers mixers.jsonl

Each variant is aligned and distilled on the same rows, in the same order, and then measured as selection_study.py
measures. A finished measurement is a line of `--records` and is not done again.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from selection_study import BEGAN, Records, Study, parser_of, say
from study_rows import Rows, StudyRows

from jaxhybrid.assembly import RunModels
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.run_folder import RunFolder, folder_of
from jaxhybrid.settings.read import load_config


class RunTogether(StudyRows):
    """The same with training text in which documents see those before them in their row."""

    def text(self, part: str) -> Rows:
        found = super().text(part)
        if part == "train":
            found["segment_ids"] = np.minimum(found["segment_ids"], 1)
        return found


class RowsRepeated(RunModels):
    """Models whose mixers start from keys and values as the published code of arXiv 2512.20569 expands them: each row
    of the projection repeated, so that a query head reads a part of a teacher's head, stretched."""

    def initial_mixers(self) -> Params:
        attention = self._file_values(["mixers"])["mixers"][FULL_ATTENTION]
        groups = self.teacher_config.num_heads // self.teacher_config.num_kv_heads
        ((kind, mixers),) = super().initial_mixers().items()

        def repeated(weight: jax.Array, own: jax.Array) -> jax.Array:
            return jax.device_put(rows_repeated(np.asarray(weight, np.float32), groups), own.sharding)

        changed = {name: jax.tree.map(repeated, attention[name], mixers[name]) for name in ("k_proj", "v_proj")}
        return {kind: mixers | changed}


def rows_repeated(weight: np.ndarray, groups: int) -> np.ndarray:
    """[..., heads, K] -> [..., heads * groups, K]; row i of the result, counted over heads, is row i // groups."""
    *outer, heads, width = weight.shape
    return np.repeat(weight.reshape(*outer, heads * width), groups, axis=-1).reshape(*outer, heads * groups, width)


@dataclass(frozen=True)
class Variant:
    settings: tuple[str, ...] = ()  # over the config
    models: Callable[..., RunModels] = RunModels
    rows: type[StudyRows] = StudyRows


VARIANTS = {
    "heads cloned whole, output gate, no convolution": Variant(),
    "rows repeated": Variant(models=RowsRepeated),
    "no output gate": Variant(("mixer.output_gate=false",)),
    "grouped keys and values": Variant(("mixer.expand_kv=false",)),
    "convolution of 4 taps": Variant(("mixer.conv_size=4",)),
    "documents run together": Variant(rows=RunTogether),
    "slow decays": Variant(("mixer.decay_init=slow",)),
    "gated linear attention": Variant(("mixer.kind=gla",)),
}


def measure(variant: Variant, options: argparse.Namespace, records: Callable[[Study], Records]) -> None:
    config = load_config(options.run, [*options.settings, *variant.settings])
    layers, mesh = tuple(options.layers), make_mesh(**config.mesh.sizes)
    with jax.set_mesh(mesh):
        models = variant.models(config, RunFolder(folder_of(config)), mesh)
        study = Study(models, config, variant.rows(options.rows), options)
        found = records(study)

        def untrained() -> dict[str, Any]:
            linear = study.compared_on.kl(())
            return {"kl_linear": linear, "alignment": float(np.mean(study.layer_losses())), **study.untrained(layers)}

        name = {"layers": list(layers)}
        aligned = found.get({"kind": "untrained", **name}, untrained)
        kls = f"KL all linear {aligned['kl_linear']:.4f}, of the set {aligned['kl']:.4f}"
        say(f"  alignment loss {aligned['alignment']:.4f}, {kls}")
        for seed in range(options.seeds):
            asked = {"kind": "distilled", **name, "seed": seed, "tokens": options.distill_tokens}
            after = found.get(
                asked | {"batch": options.distill_batch},
                lambda seed=seed: study.measured(study.distilled(layers, seed), layers),
            )
            say(f"  distilled, seed {seed}: KL {after['kl']:.4f}, long {after['kl_long']:.4f}, {after['recall']}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="that stay softmax")
    numbers = ", ".join(f"{number} {name}" for number, name in enumerate(VARIANTS))
    parser.add_argument("--variants", type=int, nargs="*", default=list(range(len(VARIANTS))), help=numbers)
    parser.set_defaults(mixers=None)
    options = parser.parse_args()
    names = list(VARIANTS)
    for number in options.variants:
        if options.minutes is not None and time.perf_counter() - BEGAN > 60 * options.minutes:
            say("out of time; call again to go on")
            return
        say(names[number])
        of_variant = {"variant": names[number]}
        measure(
            VARIANTS[names[number]],
            options,
            lambda study, of_variant=of_variant: Records(options.records, study.design | of_variant, options.known),
        )


if __name__ == "__main__":
    main()
