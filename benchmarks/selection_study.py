"""Methods of layer selection side by side: which layers, at what cost, and how far from the teacher the hybrid is.

    python benchmarks/selection_study.py runs/NAME --output study.md               # a run whose align stage is done
    python benchmarks/selection_study.py runs/NAME --write-rows rows.npz           # its text, for a machine without it
    python benchmarks/selection_study.py CONFIG.yaml --rows rows.npz --align-tokens 10_000_000 --output study.md

Every method chooses on the first `--tokens` held-out tokens; KL is measured on the held-out rows after those, for the
untrained hybrid and, with `--distill-tokens N`, after distilling it on N tokens with each of `--seeds` orders of the
training rows. One program trains and one measures every set. The output is rewritten after every figure, so what is
there when the time is up stands.

`--rows` is an .npz of int arrays [rows,T], `train` and `heldout`, and if rows hold several documents `train_segments`
and `heldout_segments` (0: padding). With it neither grain nor datasets is needed.
A method is written NAME or NAME:key=value,key=value with settings of select.NAME, as greedy_kl:swaps=true.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from jaxhybrid.assembly import RunModels
from jaxhybrid.model.blueprint import Params, count_parameters
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model, hidden_states, model_variables
from jaxhybrid.run_folder import RunFolder, folder_of
from jaxhybrid.selection.choice import Choice, Given
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.methods import METHODS, choose
from jaxhybrid.selection.ranking import read_scores
from jaxhybrid.selection.rounds import RoundLog
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.select import SelectConfig
from jaxhybrid.stages.align import align_loss, align_step, linear_mixers
from jaxhybrid.stages.batch import Batch, count_tokens, token_mask
from jaxhybrid.stages.score import masked_kl
from jaxhybrid.train.optimizer import TrainState, make_optimizer, start, update
from jaxhybrid.train.placement import place_batch

DEFAULT = (
    "greedy_kl", "greedy_kl:swaps=true", "removal", "single_kl", "perplexity", "activation_mse", "alignment_loss",
    "cosine", "uniform", "first", "middle", "last",
)  # fmt: skip
BEGAN = time.perf_counter()
Rows = dict[str, np.ndarray]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", flush=True)


# --- text


def rows_of_file(path: Path, part: str) -> Rows:
    with np.load(path) as file:
        tokens = file[part].astype(np.int32)
        name = f"{part}_segments"
        segments = file[name].astype(np.int32) if name in file else np.ones_like(tokens)
    return {"tokens": tokens, "segment_ids": segments}


def rows_of_run(config: RunConfig, teacher: RunModels, length: int, tokens: dict[str, int]) -> dict[str, Rows]:
    from itertools import islice

    from jaxhybrid.data import open_text

    files = teacher.teacher_files
    text = open_text(config.data, str(files.folder), files.config.vocab_size)
    stage = config.align.model_copy(update={"sequence_length": length, "batch_size": 16})
    batches = {
        "train": list(islice(text.training_batches(stage, config.seed), -(-tokens["train"] // (16 * length)))),
        "heldout": list(text.heldout_batches(length, 16, tokens["heldout"])),
    }
    return {
        part: {name: np.concatenate([batch[name] for batch in found]) for name in ("tokens", "segment_ids")}
        for part, found in batches.items()
    }


def batches_of(rows: Rows, size: int, order: np.ndarray | None = None) -> list[Rows]:
    """Whole batches, in the order given."""
    numbers = np.arange(len(rows["tokens"])) if order is None else order
    cut = [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]
    return [{name: array[chosen] for name, array in rows.items()} for chosen in cut]


def forever(rows: Rows, size: int, seed: int) -> Iterator[Rows]:
    rng = np.random.default_rng(seed)
    while True:
        yield from batches_of(rows, size, rng.permutation(len(rows["tokens"])))


# --- models


class Study:
    """A teacher, its aligned student, and the rows they are compared on."""

    def __init__(self, models: RunModels, config: RunConfig, train: Rows, heldout: Rows, options: argparse.Namespace):
        self.models, self.config, self.options, self.train = models, config, options, train
        self.mesh, self.dtype, self.depth = models.mesh, models.dtype, models.depth
        self.teacher, self.parameters = models.frozen_teacher, count_parameters(model_variables(models.teacher_config))
        size, length = options.batch_size, heldout["tokens"].shape[1]
        batches = batches_of(heldout, size)
        count = -(-options.tokens // (size * length))
        if count >= len(batches):
            raise SystemExit(
                f"error: --tokens {options.tokens:,} leave none of the {len(batches)} held-out batches of {size} rows "
                "to compare on. Give more held-out rows, fewer --tokens or a smaller --batch-size."
            )
        self.measure = {"tokens": count * size * length, "sequence_length": length, "batch_size": size}
        self.student = self._student()
        pair = self.teacher, self.student
        self.chosen_on, self.compared_on = (
            MaskedStudent(*pair, [(1.0, part)], self.mesh, self.dtype, options.kl_chunk)
            for part in (batches[:count], batches[count:][: options.test_batches])
        )
        self.loss_rows = place_batch(batches[0], self.mesh)

    def _student(self) -> Model:
        if self.models.folder.is_done("align"):
            return self.models.candidates()
        if not self.options.align_tokens:
            raise SystemExit(f"error: {self.models.folder.path} has no finished align stage; give --align-tokens.")
        # As a run's candidates, with mixers aligned here.
        self.models.aligned_mixers = self._align  # type: ignore[method-assign]
        return self.models.candidates()

    def _align(self) -> Params:
        length = self.train["tokens"].shape[1]
        size = min(self.config.align.batch_size, len(self.train["tokens"]))
        steps = max(self.options.align_tokens // (size * length), 1)
        changes = {"tokens": steps * size * length, "batch_size": size, "sequence_length": length}
        settings = self.config.align.model_copy(update=changes | {"warmup_steps": min(20, steps // 10)})
        mixers = self.models.initial_mixers()
        optimizer = make_optimizer(settings, mixers)
        static = {"config": self.models.linear_config, "optimizer": optimizer, "dtype": self.dtype}
        step = jax.jit(partial(align_step, **static), donate_argnums=0)
        state = jax.jit(partial(start, optimizer=optimizer), donate_argnums=0)(mixers)
        for number, rows in zip(range(steps), forever(self.train, size, self.options.align_seed)):
            state, metrics = step(state, self.teacher, place_batch(rows, self.mesh))
            if number % max(steps // 10, 1) == 0 or number == steps - 1:
                say(f"align step {number + 1} of {steps}: loss {float(metrics['loss']):.4f}")
        return state.params

    def layer_losses(self) -> list[float]:
        """After alignment, on held-out rows."""
        mixers = linear_mixers(self.student.params)
        measure = partial(align_loss, config=self.student.config, dtype=self.dtype)
        return np.asarray(jax.jit(measure)(mixers, self.teacher, self.loss_rows)).tolist()

    def choose(self, method: str) -> Choice:
        name, _, given = method.partition(":")
        pairs = (pair.partition("=") for pair in given.split(",") if pair)
        own = {key: yaml.safe_load(value) for key, _, value in pairs}
        select: dict[str, Any] = {"method": name, "budget": self.options.budget, "measure": self.measure}
        select |= {name: own} if name in ("greedy_kl", "removal") else own
        scores = self.models.folder.stage("score") / "scores"
        return choose(
            Given(
                self.depth,
                SelectConfig(**select),
                scores=lambda: read_scores(scores, self.depth),
                layer_losses=self.layer_losses,
                student=cache(lambda: self.chosen_on.of(self.student)),  # with nothing measured yet
                log=RoundLog(),
            )
        )

    # --- distillation, by one program for every set

    def distiller(self) -> Callable[[tuple[int, ...], int], float]:
        """Gives the held-out KL of a set after distillation with a seed."""
        options, length = self.options, self.train["tokens"].shape[1]
        size = options.distill_batch
        steps = max(options.distill_tokens // (size * length), 1)
        changes = {"tokens": steps * size * length, "batch_size": size, "sequence_length": length}
        changes |= {"warmup_steps": min(self.config.distill.warmup_steps, steps // 10)}
        settings = self.config.distill.model_copy(update=changes)
        student, dtype = self.student, self.dtype
        masters = lambda params: jax.tree.map(lambda x: x.astype(jnp.float32), params)  # noqa: E731
        optimizer = make_optimizer(settings, jax.eval_shape(masters, student.params))

        def step(state: TrainState, mask: jax.Array, teacher: Model, batch: Batch) -> tuple[TrainState, jax.Array]:
            hidden = hidden_states(teacher, batch["tokens"], batch["segment_ids"], dtype=dtype)
            batch = {**batch, "teacher_hidden": hidden}
            counted = token_mask(batch["segment_ids"])

            def loss(params: Params) -> jax.Array:
                own = Model(params, student.config)
                kl = masked_kl(
                    own, mask, batch, counted, teacher.head, dtype=dtype, remat="block", chunk_tokens=options.kl_chunk
                )
                return kl / count_tokens(batch)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return update(state, gradients, optimizer)[0], value

        compiled = jax.jit(step, donate_argnums=0)
        begin = jax.jit(lambda params: start(masters(params), optimizer))

        def distill(layers: tuple[int, ...], seed: int) -> float:
            state, mask = begin(student.params), np.isin(np.arange(self.depth), layers)
            for number, rows in zip(range(steps), forever(self.train, size, 1000 + seed)):
                state, loss = compiled(state, mask, self.teacher, place_batch(rows, self.mesh))
                if number in (0, steps // 2, steps - 1):
                    say(f"  seed {seed}, step {number + 1} of {steps}: training KL {float(loss):.4f}")
            params = state.params
            del state
            trained = Model(params, student.config)
            return self.compared_on.of(trained).kl(layers)

        return distill


# --- the table


def table(rows: list[dict[str, Any]], header: str) -> str:
    columns = ("method", "layers", "KL where chosen", "KL, untrained", "KL, distilled", "forward tokens", "FLOPs", "s")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in sorted(rows, key=lambda row: row.get("untrained", float("inf"))):
        if "error" in row:
            lines.append(f"| {row['method']} | failed: {row['error']} |" + " |" * (len(columns) - 2))
            continue
        distilled = row.get("distilled", [])
        spread = f" ± {np.std(distilled, ddof=1):.4f} ({len(distilled)})" if len(distilled) > 1 else ""
        lines.append(
            f"| {row['method']} | {' '.join(map(str, row['layers']))} | {row['chosen']:.4f} | {row['untrained']:.4f} | "
            + (f"{np.mean(distilled):.4f}{spread}" if distilled else "-")
            + f" | {row['tokens']:,} | {row['flops']:.2e} | {row['seconds']:.1f} |"
        )
    return f"{header}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = lambda text: int(text.replace("_", ""))  # noqa: E731
    parser.add_argument("run", type=Path, help="run folder, or a config whose run is not aligned yet")
    parser.add_argument("--output", type=Path, default=Path("selection_study.md"))
    parser.add_argument("--rows", type=Path, help=".npz of token rows")
    parser.add_argument("--write-rows", type=Path, help="write the run's text as such a file, and end")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--sets", nargs="+", default=[], help="sets of your own: NAME=0,5,9")
    parser.add_argument("--random", type=int, default=10, help="random sets")
    parser.add_argument("--budget", default="0.25", help="layers kept: a count or a share")
    parser.add_argument("--tokens", type=number, default=32_768, help="held-out tokens that methods choose on")
    parser.add_argument("--test-batches", type=int, default=16, help="held-out batches to compare on, at most")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, for the run's own text")
    parser.add_argument("--train-tokens", type=number, default=10_000_000, help="of the run's own text")
    parser.add_argument("--kl-chunk", type=int, default=8192)
    parser.add_argument("--align-tokens", type=number, default=0, help="align here, if the run is not")
    parser.add_argument("--align-seed", type=int, default=0)
    parser.add_argument("--distill-tokens", type=number, default=0)
    parser.add_argument("--distill-batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1, help="orders of the training rows, for distillation")
    options = parser.parse_args()
    options.budget = float(options.budget) if "." in options.budget else int(options.budget)

    config = load_config(options.run / "config.yaml" if options.run.is_dir() else options.run)
    folder = options.run if options.run.is_dir() else folder_of(config)
    mesh = make_mesh(**config.mesh.sizes)
    with jax.set_mesh(mesh):
        models = RunModels(config, RunFolder(folder), mesh)
        if options.rows:
            train, heldout = (rows_of_file(options.rows, part) for part in ("train", "heldout"))
        else:
            held = options.tokens + options.test_batches * options.batch_size * options.length
            needed = {"train": options.train_tokens, "heldout": held}
            train, heldout = rows_of_run(config, models, options.length, needed).values()
        if options.write_rows:
            segments = {"train_segments": train["segment_ids"], "heldout_segments": heldout["segment_ids"]}
            np.savez_compressed(options.write_rows, train=train["tokens"], heldout=heldout["tokens"], **segments)
            return say(f"wrote {options.write_rows}: {train['tokens'].shape} and {heldout['tokens'].shape} tokens")
        study = Study(models, config, train, heldout, options)
        return run(study, options)


def run(study: Study, options: argparse.Namespace) -> None:
    chosen, compared = study.chosen_on, study.compared_on
    linear = chosen.kl(()), compared.kl(())
    header = (
        f"{study.config.teacher}, {len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}: "
        f"{options.budget} of {study.depth} layers softmax. Chosen on {chosen.tokens():,} held-out tokens, compared on "
        f"{compared.tokens():,} others; all linear {linear[0]:.4f} and {linear[1]:.4f} nats. "
        f"Distilled on {options.distill_tokens:,} tokens. FLOPs: 2 x parameters x tokens; seconds: with compilation."
    )
    say(header)
    named = [(f"random:seed={seed}", None) for seed in range(options.random)]
    named = [*((method, None) for method in options.methods), *named]
    named += [
        (name, tuple(map(int, layers.split(",")))) for name, _, layers in (s.partition("=") for s in options.sets)
    ]
    rows: list[dict[str, Any]] = []

    def write() -> None:
        draft = options.output.with_name(f".{options.output.name}.tmp")
        draft.write_text(table(rows, header))
        draft.replace(options.output)

    for name, layers in named:
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        try:
            began = time.perf_counter()
            found = study.choose(name) if layers is None else Choice(tuple(sorted(layers)))
            seconds = time.perf_counter() - began
            row |= {"layers": found.layers, "tokens": found.forward_tokens, "seconds": seconds}
            row |= {"flops": 2 * study.parameters * found.forward_tokens}
            row |= {"chosen": chosen.kl(found.layers), "untrained": compared.kl(found.layers)}
            say(f"{name}: {found.layers}, KL {row['chosen']:.4f}, on other rows {row['untrained']:.4f}")
        except Exception as error:
            traceback.print_exc()
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
        write()
    if options.distill_tokens:
        distill, done = study.distiller(), dict[tuple[int, ...], list[float]]()
        for seed in range(options.seeds):
            for row in (row for row in rows if "error" not in row):
                results = done.setdefault(row["layers"], [])
                if len(results) == seed:
                    say(f"distilling {row['method']}")
                    results.append(distill(row["layers"], seed))
                    say(f"  held-out KL {results[-1]:.4f}")
                row["distilled"] = results
                write()
    print(table(rows, header))
    say(f"wrote {options.output}")


if __name__ == "__main__":
    main()
