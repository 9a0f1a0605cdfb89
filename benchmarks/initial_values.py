"""What a linear mixer's initial values are worth: every way to start, measured as it is and after some alignment.

    python benchmarks/initial_values.py --records initial.jsonl --points 0 8192
    python benchmarks/initial_values.py --records initial.jsonl --table

    # One GPU, in calls of at most ten minutes: study_rows.py writes the text, see there.
    python benchmarks/initial_values.py --records initial.jsonl --rows rows.npz --dtype bfloat16 --batch-size 64 \
        --points 0 1000000 5000000 20000000 --heldout 65536 --calibrate 8 2048 --pairs 4 16 --minutes 8

A way is what `mixer` and `align.calibrate` of a config can say. Every one is aligned on the same rows in the same
order, with a rate of its own course that does not depend on where it is measured, and measured at each of `--points`:
the alignment loss, and KL(teacher, student) in nats of the all-linear student and with `--layers` softmax, on held-out
rows; with `--pairs` also the share of the recall probe's answers that are right with those layers. A measurement is a
line of `--records`; a way that has all of them is not run again, so a call that was ended, or whose `--minutes` were
over, is made again to go on. What one way takes is what `--minutes` cannot end: ways end before they begin.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from study_rows import Rows, StudyRows, batches_of

from jaxhybrid.data import HeldoutBatches, open_source, open_tokens
from jaxhybrid.data.vocabulary import load_vocabulary
from jaxhybrid.evaluate.recall_prompts import recall_task
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.settings.stages import AlignConfig
from jaxhybrid.stages.align import align_loss, align_step, linear_mixers
from jaxhybrid.stages.calibrate import calibration, with_calibration
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.train.placement import place_batch
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_teacher

BEGAN = time.perf_counter()


@dataclass(frozen=True)
class Way:
    """How mixers start."""

    mixer: dict[str, Any] = field(default_factory=dict)  # settings of it
    parts: tuple[str, ...] | None = ()  # of align.calibrate; None: all that the mixer takes
    half_lives: str = "fitted"


WAYS = {
    "drawn": Way(),
    "gate zero": Way({"gate_init": "zero"}),
    "gate of v_proj": Way({"gate_init": "value"}),
    "half-lives of 64 to 4096": Way({"decay_init": "slow"}),
    "decay": Way(parts=("decay",)),
    "strength": Way(parts=("strength",)),
    "gate": Way(parts=("gate",)),
    "scale": Way(parts=("scale",)),
    "gate, scale": Way(parts=("gate", "scale")),
    "decay, gate, scale": Way(parts=("decay", "gate", "scale")),
    "strength, gate, scale": Way(parts=("strength", "gate", "scale")),
    "all, distances": Way(parts=None, half_lives="distance"),
    "all": Way(parts=None),
    "all but scale": Way(parts=("decay", "strength", "gate")),
}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", flush=True)


class Comparison:
    """A teacher and the rows that its students are aligned and measured on."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.mesh, self.dtype = options, jax.sharding.get_mesh(), jnp.dtype(options.dtype)
        self.teacher = load_teacher(options.teacher, self.dtype, mesh=self.mesh)
        self.vocabulary = load_vocabulary(self.teacher.folder, self.teacher.config.vocab_size)
        self.training, self.heldout, self.measured_on = self._rows()
        self.masked: MaskedStudent | None = None

    def _rows(self) -> tuple[Rows, list[Rows], Rows]:
        """(rows to align on, batches to measure on, one batch to find initial values on)."""
        options = self.options
        size, (rows, length) = options.batch_size, options.calibrate
        most = max(options.points)
        if options.rows:
            study = StudyRows(options.rows)
            training, heldout = study.text("train"), batches_of(study.text("heldout"), size)
            heldout = heldout[: -(-options.heldout // heldout[0]["tokens"].size)]
            # Rows at the end of the training text, joined: a document keeps its number in them.
            taken = {name: x[-rows * length // x.shape[1] :] for name, x in training.items()}
            many = length // training["tokens"].shape[1]
            shifted = taken["segment_ids"] + 1000 * (np.arange(len(taken["tokens"])) % many)[:, None]
            taken["segment_ids"] = np.where(taken["segment_ids"] > 0, shifted, 0).astype(np.int32)
            return training, heldout, {name: x.reshape(rows, length) for name, x in taken.items()}
        source = open_source(options.text)
        tokens = open_tokens(source, self.vocabulary, "~/.cache/jaxhybrid/tokens")
        per_batch = size * options.length
        held, wanted = -(-options.heldout // per_batch), -(-most // per_batch)
        batches = HeldoutBatches(tokens, options.length, size, (held + wanted) * per_batch)
        every = {
            name: np.concatenate([b[name] for b in list(batches)[held:]] or [batches[0][name]]) for name in batches[0]
        }
        behind = (held + wanted) * per_batch
        found = HeldoutBatches(tokens, length, rows, behind + 2 * rows * length)[behind // (rows * length) + 1]
        return every, [batches[number] for number in range(held)], found

    def run(self, name: str, records: "Records") -> None:
        """Measures a way at every point."""
        way, options = WAYS[name], self.options
        linear = LINEAR_MIXERS[options.mixer]
        mixer, depth = linear.Config(**way.mixer), self.teacher.config.num_layers
        parts = linear.takes(mixer) if way.parts is None else way.parts
        if refused := [part for part in parts if part not in linear.takes(mixer)]:
            say(f"{name}: {options.mixer} takes no {', '.join(refused)}")
            return
        make = jax.jit(partial(convert, layer_types=(mixer.kind,) * depth, mixer=mixer))
        masters = jax.jit(lambda model: jax.tree.map(lambda x: x.astype(jnp.float32), model))(self.teacher)
        student = make(masters, rng=jax.random.key(options.seed))
        config, mixers = student.config, linear_mixers(student.params)
        began = time.perf_counter()
        if parts:
            fits = way.half_lives == "fitted"
            measure = partial(calibration, config=config, parts=parts, fits_decay=fits, dtype=self.dtype)
            values = jax.jit(measure)(mixers, self.teacher, place_batch(self.measured_on, self.mesh))
            mixers = jax.jit(partial(with_calibration, config=config, parts=parts))(mixers, values)
            medians = {key: round(float(np.median(x)), 3) for key, x in values.items() if key != "constant"}
            say(f"  found in {time.perf_counter() - began:.0f} s; medians {medians}")
        rows, length = options.batch_size, self.training["tokens"].shape[1]
        steps = max(max(options.points) // (rows * length), 1)
        rate = {"learning_rate": options.rate, "final_learning_rate": options.rate, "schedule": "constant"}
        shape = {"tokens": steps * rows * length, "sequence_length": length, "batch_size": rows}
        settings = AlignConfig(**shape, **rate, warmup_steps=min(10, steps // 4))
        optimizer = make_optimizer(settings, mixers)
        step = jax.jit(partial(align_step, config=config, optimizer=optimizer, dtype=self.dtype), donate_argnums=0)
        state = jax.jit(partial(start, optimizer=optimizer), donate_argnums=0)(mixers)
        stream = self._forever(rows)
        done = 0
        for point in sorted(options.points):
            for _ in range(point // (rows * length) - done):
                state, _ = step(state, self.teacher, place_batch(next(stream), self.mesh))
            done = point // (rows * length)
            records.write({"way": name, "tokens": done * rows * length}, self.figures(Model(state.params, config)))

    def _forever(self, size: int) -> Any:
        rng = np.random.default_rng(self.options.seed)
        for _ in count():
            yield from batches_of(self.training, size, rng.permutation(len(self.training["tokens"])))

    def figures(self, student: Model) -> dict[str, Any]:
        """Of an all-linear student with these mixers alone."""
        batches = [place_batch(batch, self.mesh) for batch in self.heldout]
        measure = self._loss(student)
        loss = float(np.mean([measure(student.params, self.teacher, batch) for batch in batches]))
        mixers: Params = self.teacher.params["mixers"] | student.params
        whole = Model({**self.teacher.params, "mixers": mixers}, student.config, self.teacher.folder)
        if self.masked is None or self.masked.student.config != student.config:
            self.masked = MaskedStudent(self.teacher, whole, [(1.0, self.heldout)], self.mesh, self.dtype)
        masked, layers = self.masked.of(whole), self.options.layers
        found: dict[str, Any] = {"loss": loss, "kl_linear": masked.kl(()), "kl_set": masked.kl(layers)}
        for pairs in self.options.pairs:
            task = recall_task(self.vocabulary, pairs, prompts=self.options.prompts)
            answered = masked.answer(task, layers, rows=min(self.options.prompts, 64))
            found[f"recall_{pairs}"] = answered.to_json()
        return found

    def _loss(self, student: Model) -> Any:
        if not hasattr(self, "_measure") or self._measure[0] != student.config:
            self._measure = student.config, jax.jit(partial(align_loss, config=student.config, dtype=self.dtype))
        return self._measure[1]


class Records:
    """Measurements, a line each, under what they depend on."""

    def __init__(self, path: Path, common: dict[str, Any]):
        self.path, self.common = path, common
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = [record for record in map(json.loads, lines) if common.items() <= record.items()]

    def has(self, way: str, points: list[int]) -> bool:
        return {record["tokens"] for record in self.found if record["way"] == way} >= set(points)

    def write(self, name: dict[str, Any], figures: dict[str, Any]) -> None:
        say(f"  {name['tokens']:,} tokens: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
        self.found.append(self.common | name | figures)
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[-1]) + "\n")

    def table(self) -> str:
        """Loss, KL of the all-linear student and of the set, at every point."""
        points = sorted({record["tokens"] for record in self.found})
        columns = [f"{name}, {point:,} tokens" for point in points for name in ("loss", "KL, all linear", "KL, set")]
        lines = [f"| start | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for way in dict.fromkeys(record["way"] for record in self.found):
            at = {record["tokens"]: record for record in self.found if record["way"] == way}
            cells = [at.get(point, {}).get(key) for point in points for key in ("loss", "kl_linear", "kl_set")]
            lines.append(f"| {way} | " + " | ".join("" if x is None else f"{x:.3f}" for x in cells) + " |")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="JSON lines, written on")
    parser.add_argument("--table", action="store_true", help="show what the records have, and end")
    parser.add_argument("--mixer", default="gated_deltanet", choices=list(LINEAR_MIXERS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="all of them by default")
    parser.add_argument("--teacher", default="demo:smollm2-135m", help="folder, hub id or demo:smollm2-135m")
    parser.add_argument("--text", default="pydoc", help="text source, as data.train of a run")
    parser.add_argument("--rows", type=Path, help="what study_rows.py wrote, in place of --text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row of --text")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--points", type=int, nargs="+", default=[0, 8192], help="tokens of alignment; whole steps")
    parser.add_argument("--heldout", type=int, default=2048, help="tokens that are measured on")
    parser.add_argument("--calibrate", type=int, nargs=2, default=[1, 2048], metavar=("ROWS", "LENGTH"))
    parser.add_argument(
        "--layers", type=int, nargs="*", default=[0, 1, 8, 17, 18, 20, 23, 24], help="softmax, of a set"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="of alignment, constant after a short warmup")
    parser.add_argument("--pairs", type=int, nargs="*", default=[], help="of the recall probe's lists")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--minutes", type=float, help="begin no way after so long")
    options = parser.parse_args()
    shared = ("mixer", "teacher", "length", "batch_size", "heldout", "layers", "calibrate", "rate", "seed", "dtype")
    common = {name: getattr(options, name) for name in shared}
    common |= {"text": str(options.rows or options.text), "hardware": jax.devices()[0].device_kind}
    records = Records(options.records, common)
    if options.table:
        print(records.table())
        return
    with jax.set_mesh(make_mesh()):
        comparison = Comparison(options)
        per_step = options.batch_size * comparison.training["tokens"].shape[1]
        points = [point // per_step * per_step for point in options.points]
        for name in options.ways:
            if options.minutes is not None and time.perf_counter() - BEGAN > 60 * options.minutes:
                say("out of time; call again to go on")
                return
            if not records.has(name, points):
                say(name)
                comparison.run(name, records)
    print(records.table())


if __name__ == "__main__":
    main()
