"""Methods of layer selection side by side: which layers, at what cost, and what hybrids with these layers become.

    python benchmarks/study_rows.py CONFIG.yaml rows.npz
    python benchmarks/selection_study.py CONFIG.yaml --rows rows.npz --records study.jsonl --align-tokens 10_000_000
    python benchmarks/study_tables.py study.jsonl

Every method chooses on the first `--tokens` held-out tokens. Each set is then measured as it is and, with
`--distill-tokens N`, after distilling it on N tokens: KL on held-out rows after those that methods chose on, KL on long
rows of one document each, cross entropy, and the answers to the prompts of the rows file. One program trains and one
measures every set, for which layers are softmax is a traced mask. With `--finetune-tokens N` the teacher, and what the
first method of `--main` distilled, are trained on as many tokens of the text itself.

The methods of `--main` come first, with every budget; then, for the first budget, further orders of the training rows,
`--seeds` in all; then `--others`. A finished measurement is a line of `--records`; what is there already, or in a file
of `--known`, is not done again. So a study can be made in pieces (`--minutes`) or by two processes, each with a file of
its own: the lines of both together are the study. The aligned mixers are kept in the file `--mixers`, if one is named.
With a run folder whose align stage is done, instead of a config, its mixers are taken.
A method is NAME or NAME:key=value,key=value with settings of select.NAME, as greedy_kl:swaps=true; of select.measure
with measure., as single_kl:measure.recall=0.5; of select itself where it has no section. Lists are [a,b]. text=long
lets it choose on as many tokens of long rows. `kl_guided` takes `--score-tokens` of training for each layer's
candidate. Methods that ask questions of their own take the tokenizer from the teacher's folder.
"""

import argparse
import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from study_rows import Rows, StudyRows, batches_of

from jaxhybrid.assembly import RunModels
from jaxhybrid.data.vocabulary import Vocabulary, load_vocabulary
from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.answers import is_answer, read_answers
from jaxhybrid.losses import linear_cross_entropy, next_token_targets
from jaxhybrid.model.blueprint import Params, count_parameters
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model, abstract_params, model_variables, outputs
from jaxhybrid.run_folder import RunFolder, folder_of
from jaxhybrid.selection.choice import Choice, Given
from jaxhybrid.selection.masked import MaskedStudent, trained_kl
from jaxhybrid.selection.methods import METHODS, choose
from jaxhybrid.selection.ranking import CandidateScore, Scores
from jaxhybrid.selection.rounds import RoundLog
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.select import TrainingConfig, select_config
from jaxhybrid.stages.align import align_loss, align_step, linear_mixers
from jaxhybrid.stages.batch import Batch
from jaxhybrid.train.optimizer import TrainState, make_optimizer, start, update
from jaxhybrid.train.placement import place_batch

MAIN = ("greedy_kl", "kl_guided", "uniform", "random:seed=0", "single_kl")
OTHERS = (
    "removal", "replacement_kl", "average_rank", "greedy_kl:swaps=true", "greedy_kl:beam=4", "greedy_kl:lazy=1",
    "greedy_kl:lazy=1,first_tokens=8192", "greedy_kl:measure.recall=0.5", "greedy_kl:measure.recall=1",
    "single_kl:measure.recall=0.5", "perplexity", "perplexity:measure.recall=0.5", "answer_likelihood", "halo_ratio",
    "halo_ratio:form=paper", "smart", "gram", "gram:start=softmax", "gram:confirm=20", "joint_gates",
    "joint_gates:measure.recall=0.5", "supernet", "trained_greedy", "associative_recall", "multihop_recall",
    "variable_tracking", "common_words", "frequent_words", "activation_mse", "alignment_loss", "cosine", "first",
    "middle", "last",
)  # fmt: skip
BEGAN = time.perf_counter()
Layers = tuple[int, ...]
# The training loss of a student with these layers softmax: (student, mask [L], teacher, batch) -> a scalar.
Loss = Callable[..., jax.Array]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", flush=True)


def _hash(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


class Records:
    """What has been measured, a line each, under what identifies it."""

    def __init__(self, path: Path, common: dict[str, Any], known: Iterable[Path] = (), timed: bool = True):
        """known: files whose lines count as measured, too; timed: whether records say how long they took."""
        self._path, self._common, self._timed = path, common, timed
        files = [file for file in (path, *known) if file.exists()]
        self._found = [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def find(self, name: dict[str, Any]) -> dict[str, Any] | None:
        """The first record that has all of `name`."""
        wanted = self._common | name
        fits = (found for found in self._found if all(found.get(key) == value for key, value in wanted.items()))
        return next(fits, None)

    def get(self, name: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found under `name`, or is made now."""
        if found := self.find(name):
            return found
        began = time.perf_counter()
        made = self._common | name | make()
        made["seconds"] = round(time.perf_counter() - began, 2) if self._timed else None
        self._found.append(made)
        with self._path.open("a") as file:
            file.write(json.dumps(made) + "\n")
        return made


class Study:
    """A teacher, its aligned student, and the rows they are compared on."""

    def __init__(self, models: RunModels, config: RunConfig, rows: StudyRows, options: argparse.Namespace):
        self.models, self.config, self.options, self.rows = models, config, options, rows
        self.mesh, self.dtype, self.depth = models.mesh, models.dtype, models.depth
        self.teacher, self.parameters = models.frozen_teacher, count_parameters(model_variables(models.teacher_config))
        self.train, heldout = rows.text("train"), rows.text("heldout")
        size, length = options.batch_size, heldout["tokens"].shape[1]
        batches = batches_of(heldout, size)
        long, choose_long = (batches_of(rows.text(part), options.long_batch) for part in ("long", "choose_long"))
        count = -(-options.tokens // (size * length))
        asked = batches_of(rows.prompts_to_choose_by, size)
        if count >= len(batches) or not asked or not long or not choose_long:
            raise SystemExit(
                f"error: {options.rows} has {len(batches)} held-out batches of {size} rows, of which --tokens "
                f"{options.tokens:,} take {count}; {len(asked)} batches of prompts to choose by; and {len(long)} and "
                f"{len(choose_long)} batches of {options.long_batch} long rows. Some of each must be left: write more "
                "rows, or give fewer --tokens or smaller --batch-size and --long-batch."
            )
        self.student = self._student()
        of_long = -(-options.tokens // choose_long[0]["tokens"].size)
        self.texts = {"short": batches[:count], "long": choose_long[:of_long]}
        self.asked = (asked * -(-count // len(asked)))[:count]  # as many batches of prompts as of text
        self.chosen_on = self._masked([(1.0, self.texts["short"])])
        self.compared_on = self._masked([(1.0, batches[count:][: options.test_batches])])
        self.long = self._masked([(1.0, long)])
        self.loss_rows = place_batch(batches[0], self.mesh)

    @property
    def design(self) -> dict[str, Any]:
        """What all figures of a study share: those of another design are other figures."""
        sections = [getattr(self.config, name) for name in ("mixer", "align", "score", "distill")]
        text = [self.train["tokens"], self.rows.text("heldout")["tokens"]]
        return {
            "teacher": self.config.name,
            "settings": _hash(*(section.model_dump_json(exclude_defaults=True).encode() for section in sections)),
            "text": _hash(*(rows.astype(np.int32).tobytes() for rows in text)),
            "align_tokens": self.options.align_tokens,
            "align_seed": self.options.align_seed,
            "chosen_on": self.options.tokens,
            "compared_on": self.compared_on.tokens(),
            "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
        }

    def _masked(self, texts: Any) -> MaskedStudent:
        return MaskedStudent(self.teacher, self.student, texts, self.mesh, self.dtype, self.options.kl_chunk)

    def _student(self) -> Model:
        if self.models.folder.is_done("align"):
            return self.models.candidates()
        if not self.options.align_tokens:
            raise SystemExit(f"error: {self.models.folder.path} has no finished align stage; give --align-tokens.")
        # As a run's candidates, with mixers aligned here.
        self.models.aligned_mixers = self._mixers  # type: ignore[method-assign]
        return self.models.candidates()

    def _mixers(self) -> Params:
        """Aligned here, or earlier with the same design."""
        path = self.options.mixers
        like = linear_mixers(abstract_params(self.models.linear_config, self.mesh))
        leaves, tree = jax.tree.flatten(like)
        if path and path.exists():
            with np.load(path) as file:
                if str(file["design"]) != (said := self._alignment):
                    raise SystemExit(
                        f"error: {path} holds mixers of {file['design']}, not of {said}; name another file."
                    )
                kept = [file[str(number)] for number in range(len(leaves))]
            return jax.tree.unflatten(tree, [jax.device_put(a, leaf.sharding) for a, leaf in zip(kept, leaves)])
        mixers = self._align()
        if path:
            arrays = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(mixers))}
            new = path.with_name(f"{path.stem}.new.npz")
            np.savez(new, design=self._alignment, **arrays)
            new.replace(path)
        return mixers

    @property
    def _alignment(self) -> str:
        """What decides the aligned mixers, in words."""
        asked = (self.options.align_tokens, self.options.align_seed)
        sections = (self.config.mixer.model_dump_json(), self.config.align.model_dump_json())
        return (
            f"{self.config.name} {asked} {_hash(*(part.encode() for part in sections), self.train['tokens'].tobytes())}"
        )

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
        for number, rows in zip(range(steps), self._forever(size, self.options.align_seed)):
            state, metrics = step(state, self.teacher, place_batch(rows, self.mesh))
            if number % max(steps // 5, 1) == 0 or number == steps - 1:
                say(f"align step {number + 1} of {steps}: loss {float(metrics['loss']):.4f}")
        return state.params

    def _forever(self, size: int, seed: int) -> Iterator[Rows]:
        rng = np.random.default_rng(seed)
        while True:
            yield from batches_of(self.train, size, rng.permutation(len(self.train["tokens"])))

    # --- choosing

    def choose(self, method: str, budget: int) -> Choice:
        name, _, given = method.partition(":")
        pairs = (pair.partition("=") for pair in re.split(r",(?![^\[]*\])", given) if pair)
        own = {key: yaml.safe_load(value) for key, _, value in pairs}
        text = self.texts[own.pop("text", "short")]
        rows, length = text[0]["tokens"].shape
        measure = {"tokens": len(text) * rows * length, "sequence_length": length, "batch_size": rows}
        measure |= {key.removeprefix("measure."): own.pop(key) for key in list(own) if key.startswith("measure.")}
        has_section = name in METHODS and METHODS[name].settings is not None
        select: dict[str, Any] = {"method": name, "budget": budget, "measure": measure}
        settings = select_config(**select | ({name: own} if has_section else own))
        share = settings.measure.recall  # at the prompts of the rows file
        masked = self._masked([(1 - share, text), (share, self.asked[: len(text)])] if share else [(1.0, text)])
        return choose(
            Given(
                self.depth,
                settings,
                scores=lambda: self.scores,
                layer_losses=self.layer_losses,
                student=lambda: masked,
                teacher=lambda: self.teacher,
                vocabulary=lambda: self.vocabulary,
                training=self._training,
                log=RoundLog(),
            )
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        data, files = self.config.data, self.models.teacher_files
        folder = data.tokenizer or str(files.folder)
        return load_vocabulary(folder, files.config.vocab_size, data.document_end_token, data.prepend_bos)

    @contextmanager
    def _training(self, settings: TrainingConfig) -> Iterator[Iterator[Rows]]:
        """The study's training rows in an order of their own."""
        rows, length = self.train["tokens"].shape
        if settings.sequence_length != length or settings.batch_size > rows:
            raise ConfigError(
                f"There are {rows} training rows of {length} tokens; the method asks for batches of "
                f"{settings.batch_size} with sequence_length {settings.sequence_length}."
            )
        yield self._forever(settings.batch_size, 2000)

    def layer_losses(self) -> list[float]:
        """After alignment, on held-out rows."""
        mixers = linear_mixers(self.student.params)
        measure = partial(align_loss, config=self.student.config, dtype=self.dtype)
        return np.asarray(jax.jit(measure)(mixers, self.teacher, self.loss_rows)).tolist()

    @property
    def scores(self) -> Scores:
        """Of candidates with one softmax layer, trained here: what the score stage gives."""
        return self._scores(self.options.score_tokens)

    @cache  # noqa: B019 - as a trainer
    def _scores(self, tokens: int) -> Scores:
        settings = self.config.score
        distiller = self.trainer(settings, tokens, settings.batch_size, trained_kl)
        found = []
        for layer in range(self.depth):
            trained = self.chosen_on.of(distiller((layer,), 0))
            found.append(CandidateScore(layer, [], [(tokens, trained.kl((layer,)))]))
        say("candidates' KL: " + " ".join(f"{candidate.kl('heldout'):.3f}" for candidate in found))
        return Scores(tuple(found))

    # --- training, by one program for every set

    @cache  # noqa: B019 - a study lives as long as its program
    def trainer(self, stage: Any, tokens: int, size: int, objective: Loss) -> Callable[..., Model]:
        """Gives the student of a set after training with a seed, from the aligned student or another one."""
        rows, length = self.train["tokens"].shape
        size = min(size, rows)
        steps = max(tokens // (size * length), 1)
        changes = {"tokens": steps * size * length, "batch_size": size, "sequence_length": length}
        settings = stage.model_copy(update=changes | {"warmup_steps": min(stage.warmup_steps, steps // 10)})
        student, static = self.student, {"dtype": self.dtype, "chunk_tokens": self.options.kl_chunk}
        masters = lambda params: jax.tree.map(lambda x: x.astype(jnp.float32), params)  # noqa: E731
        optimizer = make_optimizer(settings, jax.eval_shape(masters, student.params))

        def step(state: TrainState, mask: jax.Array, teacher: Model, batch: Batch) -> tuple[TrainState, jax.Array]:
            def loss(params: Params) -> jax.Array:
                return objective(Model(params, student.config), mask, teacher, batch, **static)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return update(state, gradients, optimizer)[0], value

        compiled = jax.jit(step, donate_argnums=0)
        begin = jax.jit(lambda params: start(masters(params), optimizer))

        def train(layers: Layers, seed: int, begun: Model = student) -> Model:
            state, mask = begin(begun.params), np.isin(np.arange(self.depth), layers)
            for _, rows in zip(range(steps), self._forever(size, 1000 + seed)):
                state, _ = compiled(state, mask, self.teacher, place_batch(rows, self.mesh))
            return Model(state.params, student.config)

        return train

    def distilled(self, layers: Layers, seed: int) -> Model:
        options = self.options
        return self.trainer(self.config.distill, options.distill_tokens, options.distill_batch, trained_kl)(
            layers, seed
        )

    def finetuned(self, layers: Layers, seed: int) -> Model:
        """Of all layers softmax, the teacher; of a set, what was distilled before."""
        options = self.options
        train = self.trainer(self.config.finetune, options.finetune_tokens, options.distill_batch, text_loss)
        return train(layers, seed, self.student if len(layers) == self.depth else self.distilled(layers, seed))

    # --- measuring

    def untrained(self, layers: Layers) -> dict[str, Any]:
        """KL of the aligned student with these layers softmax."""
        return {"kl": self.compared_on.kl(layers), "kl_long": self.long.kl(layers)}

    def measured(self, student: Model, layers: Layers) -> dict[str, Any]:
        """KL, cross entropy and answers of a student with these layers softmax."""
        text, long = (masked.of(student) for masked in (self.compared_on, self.long))
        figures = {"kl": text.kl(layers), "kl_long": long.kl(layers), "cross_entropy": text.cross_entropy(layers)}
        return figures | {"recall": self.recall(text.student, layers)}

    def recall(self, student: Model, layers: Layers) -> dict[str, list[int]]:
        """[right, asked] answers for each set of prompts."""
        mask = np.isin(np.arange(self.depth), layers)
        found = {}
        for name in self.rows.asked:
            asked = self.rows.recall(name)
            prompts, length = asked["tokens"].shape
            rows = min(max(self.options.recall_tokens // length, 1), prompts)
            given = np.maximum(asked["answers"], 0)
            _, greedy = read_answers(
                student, asked["tokens"], asked["places"], given, rows=rows, dtype=self.dtype, softmax=mask
            )
            right = is_answer(greedy, asked["answers"])
            found[name] = [int(right.sum()), int(right.size)]
        return found


def text_loss(
    student: Model, softmax: jax.Array, teacher: Model, batch: Batch, *, dtype: Any, chunk_tokens: int
) -> jax.Array:
    """Cross entropy of the text itself in nats per predicted token; the teacher has no part in it."""
    del teacher
    text = batch["tokens"], batch["segment_ids"]
    targets, mask = next_token_targets(*text)
    own = outputs(student, *text, softmax=softmax, dtype=dtype, remat="block")
    return linear_cross_entropy(*own, targets, mask, chunk_tokens=chunk_tokens) / jnp.maximum(jnp.sum(mask), 1.0)


class OutOfTime(Exception):
    """Of the minutes that were given."""


def run(study: Study, options: argparse.Namespace, records: Records) -> None:
    first, depth = options.budgets[0], study.depth
    failed: list[str] = []

    def get(name: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if options.minutes is not None and time.perf_counter() - BEGAN > 60 * options.minutes:
            raise OutOfTime
        return records.get(name, make)

    def reference(name: str, layers: Layers) -> None:
        found = get({"kind": "reference", "name": name}, lambda: study.measured(study.student, layers))
        say(f"{name}: KL {found['kl']:.4f}, {found['recall']}")

    def chosen(method: str, budget: int) -> Layers:
        """The set, which is measured untrained, too."""
        name = {"kind": "choice", "method": method}
        if METHODS[method.partition(":")[0]].needs == "scores":
            name["score_tokens"] = options.score_tokens

        def make() -> dict[str, Any]:
            if earlier := records.find(name | {"ranking": True}):  # a ranking is the same for every budget
                copied = ("order", "ranking", "forward_tokens", "trained_tokens", "flops")
                return {"layers": sorted(earlier["order"][:budget])} | {key: earlier[key] for key in copied}
            found = study.choose(method, budget)
            forward, trained = found.cost
            cost = {"forward_tokens": forward, "trained_tokens": trained}
            flops = study.parameters * (2 * forward + 6 * trained)
            whole = found.importance is not None and len(found.order) == depth  # smart scores, and ranks nothing
            ranking = {"ranking": True} if whole else {}
            return {"layers": list(found.layers), "order": list(found.order), **ranking, **cost, "flops": flops}

        found = get(name | {"budget": budget}, make)
        layers = tuple(found["layers"])
        say(f"{method}, {budget}: {layers}, {found['seconds']} s")
        if len(layers) == budget:
            get({"kind": "untrained", "layers": list(layers)}, lambda: study.untrained(layers))
        return layers

    def trained(kind: str, layers: Layers, seed: int) -> None:
        tokens = {"distilled": options.distill_tokens, "finetuned": options.finetune_tokens}[kind]
        if not tokens:
            return
        make = {"distilled": study.distilled, "finetuned": study.finetuned}[kind]
        name = {"kind": kind, "layers": list(layers), "seed": seed, "tokens": tokens, "batch": options.distill_batch}
        found = get(name, lambda: study.measured(make(layers, seed), layers))
        say(f"{kind} {layers}, seed {seed}: KL {found['kl']:.4f}, long {found['kl_long']:.4f}, {found['recall']}")

    try:
        reference("teacher", tuple(range(depth)))
        reference("all linear", ())
        for budget in options.budgets:
            for method in options.main:
                trained("distilled", chosen(method, budget), 0)
        for seed in range(1, options.seeds):
            for method in options.main:
                trained("distilled", chosen(method, first), seed)
        if options.main:
            trained("finetuned", tuple(range(depth)), 0)
            trained("finetuned", chosen(options.main[0], first), 0)
        random = [f"random:seed={seed}" for seed in range(1, options.random + 1)]
        for budget in options.budgets:
            for method in (*options.others, *random):
                try:
                    trained("distilled", chosen(method, budget), 0)
                except OutOfTime:
                    raise
                except Exception as error:  # the other methods do not depend on it
                    traceback.print_exc()
                    failed.append(f"{method}, {budget}: {type(error).__name__}: {error}")
    except OutOfTime:
        say("out of time; call again to go on")
    else:
        say("all is measured" if not failed else "all others are measured")
    if failed:
        raise SystemExit("\n".join(["error: of --others there failed", *failed]))


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Study]:
    """The study that the options of `parser_of` name, with its mesh set."""
    config = load_config(options.run / "config.yaml" if options.run.is_dir() else options.run, options.settings)
    folder = options.run if options.run.is_dir() else folder_of(config)
    mesh = make_mesh(**config.mesh.sizes)
    with jax.set_mesh(mesh):
        yield Study(RunModels(config, RunFolder(folder), mesh), config, StudyRows(options.rows), options)


def records_of(study: Study) -> Records:
    options = study.options
    return Records(options.records, study.design, options.known, not options.untimed)


def number_of(text: str) -> int:
    return int(text.replace("_", ""))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Of what a study and the rows that it is made on have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or a config whose run is not aligned yet")
    parser.add_argument("settings", nargs="*", help="over the config")
    parser.add_argument("--rows", type=Path, required=True, help="what study_rows.py wrote")
    parser.add_argument("--records", type=Path, required=True, help="JSON lines, written on")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="more records, read only")
    parser.add_argument("--untimed", action="store_true", help="no seconds in the records: the device has other work")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--tokens", type=number_of, default=32_768, help="held-out tokens that methods choose on")
    parser.add_argument("--test-batches", type=int, default=12, help="held-out batches to compare on, at most")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--long-batch", type=int, default=8)
    parser.add_argument("--recall-tokens", type=number_of, default=65_536, help="of recall prompts, at once")
    parser.add_argument("--kl-chunk", type=int, default=8192)
    parser.add_argument("--align-tokens", type=number_of, default=0, help="align here, if the run is not")
    parser.add_argument("--align-seed", type=int, default=0)
    parser.add_argument("--distill-tokens", type=number_of, default=0)
    parser.add_argument("--distill-batch", type=int, default=128)
    parser.add_argument(
        "--seeds", type=int, default=3, help="orders of the training rows, for --main with the first of --budgets"
    )
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--main", nargs="*", default=list(MAIN), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--others", nargs="*", default=list(OTHERS))
    parser.add_argument("--random", type=int, default=8, help="random sets more, with seeds from 1")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8], help="layers kept")
    parser.add_argument("--score-tokens", type=number_of, default=262_144, help="of each candidate of kl_guided")
    parser.add_argument("--finetune-tokens", type=number_of, default=0)
    parser.add_argument("--mixers", type=Path, help="an npz file for aligned mixers: read if it is there, or written")
    options = parser.parse_args()
    with opened(options) as study:
        run(study, options, records_of(study))


if __name__ == "__main__":
    main()
