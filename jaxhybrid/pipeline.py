"""A whole run, stage after stage, each one skipped when its result is there and resumed when it is half done."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid import hosts
from jaxhybrid.assembly import TRAINED, RunModels
from jaxhybrid.checksums import MANIFEST, file_checksum, read_result, write_result
from jaxhybrid.complete import end_ids
from jaxhybrid.data import BatchIterator, HeldoutBatches, Text, mean_segment_tokens, open_text
from jaxhybrid.disk import DiskPlan, require
from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.recall_prompts import answer_batches
from jaxhybrid.evaluate.record import Asked, evaluation_record, prepare
from jaxhybrid.export.folder import export, refuse_to_replace
from jaxhybrid.measure import peak_memory_bytes
from jaxhybrid.model.blueprint import Params, count_active
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import ROWS, check_batches, make_mesh, own_share
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.report import evaluation_table, notes, write_report
from jaxhybrid.run_folder import RunFolder, package_versions, source_digest
from jaxhybrid.selection.choice import Given
from jaxhybrid.selection.compare import Listed, comparison, of_choice, published
from jaxhybrid.selection.kl_guided import score_candidates
from jaxhybrid.selection.masked import MaskedStudent, Texts
from jaxhybrid.selection.methods import METHODS, choose
from jaxhybrid.selection.questions import recall_prompts
from jaxhybrid.selection.ranking import Scores, read_scores
from jaxhybrid.selection.record import at_hand, choice_record, merge_scores, scores_record
from jaxhybrid.selection.rounds import RoundLog
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.compare import fingerprint, flat
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.select import SelectConfig, select_config
from jaxhybrid.settings.stages import STAGES, StageConfig
from jaxhybrid.stages.align import align_loss
from jaxhybrid.stages.batch import Metrics
from jaxhybrid.stages.calibrate import Calibration
from jaxhybrid.stages.programs import abstract_state, stage_step, trained_params
from jaxhybrid.train.checkpoint import steps_in
from jaxhybrid.train.interrupt import stop_between
from jaxhybrid.train.loop import HostBatch, train
from jaxhybrid.train.metrics import read_metrics, training_figures
from jaxhybrid.train.optimizer import TrainState, make_optimizer, start
from jaxhybrid.train.placement import place_batch

# What a selection measures on, what a method that trains trains on, and what initial values are measured on.
OWN_TEXTS = ("measure", "training", "calibration")
SAMPLED_TOKENS = 500_000  # of a stage's first batches, whose segments are measured


class Pipeline:
    """The stages of one run over one config. Use as a context: the mesh is active inside it."""

    def __init__(self, config: RunConfig, devices: Sequence[Any] | None = None):
        self.config = config
        hosts.agree(flat(config), "configs")
        hosts.agree(package_versions() | {"jaxhybrid's files": source_digest()}, "versions")
        self.folder = RunFolder.open(config)
        self.mesh = make_mesh(**config.mesh.sizes, devices=devices)
        self.models = RunModels(config, self.folder, self.mesh)
        self.dtype = jnp.dtype(config.dtype)

    def __enter__(self) -> "Pipeline":
        self._active = jax.set_mesh(self.mesh)
        self._active.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._active.__exit__(*error)

    # --- text

    @cached_property
    def text(self) -> Text:
        """Training and held-out text, and the tokenizer; says once what stands round a document.

        Raises:
            RunError: hosts have read other text.
        """
        teacher = self.models.teacher_files
        text = open_text(self.config.data, str(teacher.folder), teacher.config.vocab_size)
        hosts.agree(text.fingerprints(), "text")
        hosts.say(f"text: {text.vocabulary.describe()}")
        return text

    def stream(self, name: str) -> BatchIterator:
        """A stage's training batches from their start, this process's rows; stages see different orders."""
        return self.text.training_batches(getattr(self.config, name), self._seed(name))

    def segment_tokens(self, name: str) -> float:
        """Mean length of a segment in a stage's first batches; said, for it bounds the context that is trained."""
        stage: StageConfig = getattr(self.config, name)
        count, text = max(1, min(SAMPLED_TOKENS // stage.tokens_per_step, stage.steps)), self.text

        def measure() -> float:
            with closing(text.training_batches(stage, self._seed(name), host=(0, 1))) as batches:
                return round(mean_segment_tokens(islice(batches, count)), 1)

        mean = hosts.by_first(measure, f"segments of {name}")
        hosts.say(notes.segments(name, stage, mean))
        return mean

    def _seed(self, name: str) -> int:
        return self.config.seed * 1000 + 1 + (*STAGES, *OWN_TEXTS).index(name)

    @cached_property
    def asked(self) -> Asked:
        """The prompts of the evaluation; refuses those that the teacher cannot read."""
        files, vocabulary = self.models.teacher_files, self.text.vocabulary
        ends = end_ids(Path(files.folder), vocabulary.tokenizer.eos_token_id)
        context, folder = files.config.max_position_embeddings, self.folder.path / "prompts"
        return prepare(self.config.evaluate, vocabulary, ends, context, folder, hosts.count())

    # --- stages

    def run(self) -> None:
        """Everything that is missing, in order, then the table and the paths."""
        # Refused now, not after hours of training.
        disk, undone = self.disk, [stage for stage in STAGES if not self.folder.is_done(stage)]
        chosen = self._is_chosen()

        def refuse() -> None:
            refuse_to_replace(self.export_folder, None, overwrite=False)
            disk.require_run(self.folder.path, undone)

        hosts.by_first(refuse, "disk of the run")
        due = {*undone, "evaluate", *(() if chosen else ("select",))}
        batches = (one for one in self.config.batches(self.mesh.size) if one[0].partition(".")[0] in due)
        check_batches(batches, self.mesh.shape)
        _ = self.asked
        self.align()
        if "scores" in self.config.select.needs:
            self.score()
        self.select()
        self.distill()
        self.finetune()
        hosts.say(evaluation_table(self.evaluate()))
        exported = self.export()
        report = hosts.by_first(lambda: str(write_report(self.folder.path)), "report")
        hosts.say(notes.end_of_run(self.config, exported, Path(report)))

    def reuse(self, other: Path) -> None:
        """Takes over what another run has finished and this one would repeat; says what, and what not and why."""
        for stage, outcome in hosts.by_first(lambda: self.folder.reuse(other), f"reuse {other}").items():
            hosts.say(f"reuse: {stage} {outcome}")

    def align(self) -> None:
        """Stage 1: the linear mixers of every layer learn the teacher's attention outputs."""
        if not self._begins("align"):
            return
        settings, student = self.config.align, self.models.linear_config
        rows = settings.batch_size // settings.gradient_accumulation
        tokens = min(settings.tokens_per_step, self.text.heldout.num_tokens)
        batch = place_batch(self.text.heldout_batches(settings.sequence_length, rows, tokens)[0], self.mesh)
        measure = jax.jit(partial(align_loss, config=student, dtype=self.dtype))
        measured = self._calibration()
        initial = partial(self.models.initial_mixers, measured)
        before = np.asarray(measure(initial(), self.models.teacher_of(settings), batch))
        mixers, figures = self._train("align", student, initial)
        after = np.asarray(measure(mixers, self.models.teacher_of(settings), batch))
        summary = figures | {
            "heldout_loss_before": float(before.mean()),
            "heldout_loss_after": float(after.mean()),
            "heldout_layer_loss_before": before.tolist(),
            "heldout_layer_loss_after": after.tolist(),
        }
        if measured is not None:
            values = {name: np.asarray(x) for name, x in measured.items() if name != "constant"}
            summary["calibration"] = {name: np.round(x.astype(float), 4).tolist() for name, x in values.items()}
        self._finish("align", mixers, summary)
        hosts.say(notes.alignment(before.mean(), after.mean()))

    def _calibration(self) -> Calibration | None:
        """What `align.calibrate` asks for; measured again when a run goes on, on the same text.

        Raises:
            TopologyError: its rows do not divide over the devices.
        """
        settings = self.config.align.calibrate
        if settings is None:
            return None
        rows, length = settings.batch_size, settings.sequence_length
        check_batches([("align.calibrate", rows, 1, length)], self.mesh.shape)
        with closing(self._own_text("calibration", length, rows)) as stream:
            batch = place_batch(next(stream), self.mesh)
        measured = self.models.calibration(batch)
        hosts.say(notes.calibration(self.config, {name: np.asarray(x) for name, x in measured.items()}))
        return measured

    def score(self, candidates: Sequence[int] | None = None) -> None:
        """Importance of every layer, or of some of them; the last one to be scored completes `scores.json`."""
        if self.folder.is_done("score") and self._unscored():  # some were damaged, and deleted
            hosts.by_first(lambda: self.folder.reopen("score"), "score again")
        if not self._begins("score", candidates):
            return
        folder, layers = self.folder.stage("score"), range(self.models.depth)
        segment_tokens = self.segment_tokens("score")
        begun_before = hosts.by_first(
            lambda: any((folder / name).exists() for name in ("scores", "candidates")), "scoring was begun"
        )
        began = time.perf_counter()
        compiled = score_candidates(
            self.models.frozen_teacher,
            self.models.candidates(),
            self.config,
            lambda: self.stream("score"),
            self._scored_texts(),
            folder,
            self.mesh,
            layers if candidates is None else candidates,
        )
        seconds = time.perf_counter() - began
        hosts.say(f"score: programs compiled for all candidates: {compiled}")
        if missing := self._unscored():
            hosts.say(f"score: layers {missing} are still to be scored")
            return

        def complete() -> int:
            self.write_scores()
            return sum(c.heldout[-1][0] for c in self.scores().candidates)

        tokens = hosts.by_first(complete, "complete the scores")
        self.folder.finish(
            "score",
            {
                "compiled_programs": compiled,
                "candidate_tokens": tokens,
                "mean_segment_tokens": segment_tokens,
                # This process's share of the work is the whole only if it did all of it.
                "seconds": None if begun_before else round(seconds, 1),
                "tokens_per_second": None if begun_before else round(tokens / seconds),
                "peak_memory_bytes": peak_memory_bytes(),
            },
        )

    def _unscored(self) -> list[int]:
        """Layers without a score."""
        files = {
            layer: self.folder.stage("score") / "scores" / f"{layer:03d}.json" for layer in range(self.models.depth)
        }
        return hosts.by_first(lambda: [layer for layer, file in files.items() if not file.exists()], "missing scores")

    def merge_scores(self, other: Path) -> None:
        """Takes over the finished candidates of another run of the same config (scored on another machine, say)."""
        folder = self.folder.stage("score") / "scores"
        hosts.by_first(lambda: merge_scores(folder, self.config, other), f"merge {other}")

    def scores(self) -> Scores:
        return read_scores(self.folder.stage("score") / "scores", self.models.depth)

    def write_scores(self) -> None:
        write_result(self.folder.path / "scores.json", scores_record(self.scores(), self.config))

    def select(self) -> tuple[int, ...]:
        """The layers that stay softmax; written to `layers.json` with what the choice rests on."""
        measures = METHODS[self.config.select.method].runs_models
        log = self._rounds(self.config.select, "rounds") if measures else RoundLog()
        given = self._given(self.config.select, cache(self._masked_student), log)
        measured = choose(given) if measures else None  # by all processes

        def decide() -> dict[str, Any]:
            choice = measured or choose(given)
            record = choice_record(choice, given, self.config, self.teacher_parameters)
            if "scores" in self.config.select.needs:
                self.write_scores()  # those of another run were ranked as that one has it
            write_result(self.folder.path / "layers.json", record)
            return record

        record = hosts.by_first(decide, "select")
        hosts.say(notes.choice(record))
        return tuple(record["softmax_layers"])

    def _is_chosen(self) -> bool:
        return hosts.by_first((self.folder.path / "layers.json").exists, "layers are chosen")

    def compare(self, others: Sequence[str] = ()) -> dict[str, Any]:
        """The rankings at hand, those of the methods that measure nothing and of `others`, and published ones.

        Nothing is chosen. What `others` measure is kept beside the rounds of the selection.

        Raises:
            ConfigError: one of `others` is no method, or needs what is not there.
        """
        depth, select, path = self.models.depth, self.config.select, self.folder.path
        if unknown := [name for name in others if name not in METHODS]:
            raise ConfigError(f"--with {unknown[0]} is no method of selection; choose of {', '.join(METHODS)}.")
        count = layers_in_budget(select.budget, depth)
        names = [*others, *(name for name, method in METHODS.items() if method.needs == "nothing" and not method.drawn)]
        if self.folder.is_done("align"):
            names.append("alignment_loss")
        student = cache(self._masked_student)

        def listed(name: str) -> Listed:
            settings = select_config(**select.model_dump() | {"method": name, "layers": None, "budget": count})
            log = self._rounds(settings, f"compare-{name}") if METHODS[name].runs_models else RoundLog()
            return of_choice(name, "computed now", choose(self._given(settings, student, log)), depth)

        names = list(dict.fromkeys(names))
        measured = {name: listed(name) for name in names if METHODS[name].runs_models}  # by all processes

        def compared() -> dict[str, Any]:
            lists = [measured.get(name) or listed(name) for name in names]
            return comparison([*at_hand(path), *lists, *published(depth)], depth, count)

        return hosts.by_first(compared, "compare")

    def _given(self, select: SelectConfig, student: Callable[[], MaskedStudent], log: RoundLog) -> Given:
        return Given(
            self.models.depth,
            select,
            scores=self.scores,
            layer_losses=lambda: self.folder.read("align/done.json", "align")["heldout_layer_loss_after"],
            student=student,
            teacher=lambda: self.models.frozen_teacher,
            vocabulary=lambda: self.text.vocabulary,
            training=lambda text: closing(self._own_text("training", text.sequence_length, text.batch_size)),
            log=log,
        )

    def _own_text(self, use: str, sequence_length: int, batch_size: int) -> BatchIterator:
        """Training batches in an order that no stage and no other of the `OWN_TEXTS` sees."""
        rows = self.config.align.model_copy(update={"sequence_length": sequence_length, "batch_size": batch_size})
        return self.text.training_batches(rows, self._seed(use))

    @cached_property
    def teacher_parameters(self) -> int:
        """That a token meets: what its floating-point operations are counted by."""
        return count_active(model_variables(self.models.teacher_config), self.models.teacher_config)

    def _rounds(self, select: SelectConfig, name: str) -> RoundLog:
        """Of a selection, from where it was left."""
        config = self.config.model_copy(update={"select": select})
        aligned = self.folder.stage("align") / "params" / MANIFEST

        def key() -> dict[str, Any]:
            settings = fingerprint(config, ("seed", "teacher", "dtype", "mixer", "data", "align", "select"))
            return {"settings": settings, "aligned": file_checksum(aligned) if aligned.exists() else None}

        return RoundLog(self.folder.path / "select" / f"{name}.json", hosts.by_first(key, "key of the rounds"))

    def _masked_student(self) -> MaskedStudent:
        chunk, student = self.config.select.measure.kl_chunk, self.models.candidates()
        teacher, texts = self.models.frozen_teacher, self._measured_texts()
        return MaskedStudent(teacher, student, texts, self.mesh, self.dtype, chunk)

    def _measured_texts(self) -> Texts:
        """This process's rows of what `select.measure` names, and of recall prompts if they are to count."""
        measure = self.config.select.measure
        batches: Sequence[HostBatch]
        if measure.source == "heldout":
            batches = self.text.heldout_batches(measure.sequence_length, measure.batch_size, measure.tokens)
        else:
            with closing(self._own_text("measure", measure.sequence_length, measure.batch_size)) as stream:
                batches = list(islice(stream, measure.batches))
        if not (share := measure.recall):
            return [(1.0, batches)]
        longest = self.models.teacher_config.max_position_embeddings
        asked = self._asked("select.measure", measure.recall_pairs, len(batches), measure.batch_size, longest)
        return [(1.0 - share, batches), (share, asked)]

    def _scored_texts(self) -> Texts:
        """This process's rows of held-out text, and of recall prompts, as long, if they are to count."""
        settings = self.config.score
        length, rows = settings.sequence_length, settings.batch_size
        batches = self.text.heldout_batches(length, rows, settings.heldout_tokens)
        if not (share := settings.recall):
            return [(1.0, batches)]
        asked = self._asked("score", settings.recall_pairs, len(batches), rows, length)
        wide = [{name: np.pad(x, ((0, 0), (0, length - x.shape[1]))) for name, x in batch.items()} for batch in asked]
        return [(1.0 - share, batches), (share, wide)]

    def _asked(self, section: str, pairs: int, batches: int, rows: int, longest: int) -> list[HostBatch]:
        """This process's rows of so many batches of recall prompts, others than the evaluation's."""
        task = recall_prompts(self.text.vocabulary, pairs, batches * rows, longest, f"{section}.recall_pairs")
        return answer_batches(task, rows, *own_share(self.mesh, *ROWS))

    def distill(self) -> None:
        """Stage 2: KL to the teacher, all parameters."""
        if not self._begins("distill"):
            return
        student = self.models.hybrid_config
        self._finish("distill", *self._train("distill", student, self.models.hybrid))

    def finetune(self) -> None:
        """Stage 3: cross entropy, usually at a longer context."""
        if not self._begins("finetune"):
            return
        self.models.drop_teacher()
        student = self.models.hybrid_config

        def distilled() -> Params:
            return self.models.trained("distill").params

        self._finish("finetune", *self._train("finetune", student, distilled))

    def evaluate(self) -> dict[str, Any]:
        """Teacher and students on held-out text and in tasks; written to `evaluation.json`."""
        stop_between("evaluating")
        settings = self.config.evaluate
        chosen = self._is_chosen()
        result = evaluation_record(
            {"teacher": self.models.frozen_teacher}
            | {stage: self.models.trained(stage, self.dtype) for stage in TRAINED if self.folder.is_done(stage)},
            settings,
            {length: self._heldout_rows(length) for length in (settings.sequence_length, *settings.lengths)},
            self.asked,
            softmax_layers=self.folder.read("layers.json", "select")["softmax_layers"] if chosen else None,
            rows={name: self._made(name) for name in ("teacher", *TRAINED)},
            answers=self.folder.path / "answers",
            mesh=self.mesh,
            dtype=self.dtype,
        )
        hosts.by_first(lambda: write_result(self.folder.path / "evaluation.json", result), "write the evaluation")
        return result

    def _made(self, name: str) -> dict[str, Any]:
        """How a model of the evaluation came to be."""
        trained = ("align", *TRAINED)[: (*TRAINED,).index(name) + 2] if name in TRAINED else ()
        stages: list[StageConfig] = [getattr(self.config, stage) for stage in trained]
        return {
            "seed": self.config.seed,
            "trained_tokens": sum(stage.steps * stage.tokens_per_step for stage in stages),
            "config": fingerprint(self.config),
            "hardware": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
        }

    def _heldout_rows(self, length: int) -> HeldoutBatches:
        """Held-out text in rows of `length` tokens, as many tokens at once as in those of `sequence_length`."""
        settings, rows = self.config.evaluate, self.config.evaluate.batch_size
        if length != settings.sequence_length:
            devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            rows = max(settings.batch_tokens // length // devices, 1) * devices
        return self.text.heldout_batches(length, rows, settings.heldout_tokens)

    @property
    def export_folder(self) -> Path:
        return Path(self.config.export.folder or self.folder.path / "export").expanduser().absolute()

    def export(self, folder: str | None = None, overwrite: bool = False, format: str = "") -> Path:
        """The Hugging Face folder of the trained student, in another form than the config's where `format` says so.

        `overwrite` replaces what is no earlier export, too.
        """
        stop_between("the export")
        settings, disk = self.config.export, self.disk
        target = Path(folder or self.export_folder)

        def refuse() -> None:
            refuse_to_replace(target, None, overwrite)
            require("export", disk.needs("export"), 0, target)

        hosts.by_first(refuse, "disk of the export")  # before the student is loaded
        self.models.drop_teacher()
        student = self.models.trained(dtype=jnp.dtype(settings.dtype))
        evaluation = self.folder.path / "evaluation.json"
        made = notes.model_card(self.config, read_result(evaluation) if evaluation.exists() else None)
        return export(
            student, target, settings.dtype, format=format or settings.format,
            max_shard_bytes=settings.max_shard_bytes, overwrite=overwrite, told=hosts.say, made=made,
        )  # fmt: skip

    # --- what stages begin and end with, and the training that three of them share

    @cached_property
    def disk(self) -> DiskPlan:
        return DiskPlan(self.config, self.models.linear_config)

    def _begins(self, stage: str, candidates: Sequence[int] | None = None) -> bool:
        """Whether a stage is still to be done; then says what disk it takes, and refuses when less is free."""
        if self.folder.is_done(stage):
            return False
        stop_between(stage)
        disk = self.disk
        hosts.by_first(lambda: disk.require_stage(stage, self.folder.stage(stage), candidates), f"disk of {stage}")
        return True

    def _train(self, name: str, student: ModelConfig, make: Callable[[], Params]) -> tuple[Params, dict[str, Any]]:
        """Trained parameters, and what the stage's record says beside what its metrics do.

        Args:
            make: float32 masters to start from; nobody else's, for the state is made of them.
        """
        settings: StageConfig = getattr(self.config, name)
        figures = {"mean_segment_tokens": self.segment_tokens(name)}
        like = trained_params(name, student, self.models.teacher_config, self.mesh)
        optimizer = make_optimizer(settings, like)
        compiled = stage_step(name, self.config, student, optimizer)

        def on_host_batch(state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics]:
            return compiled(state, *frozen, place_batch(batch, self.mesh, settings.gradient_accumulation))

        begin = partial(start, optimizer=optimizer, offload=settings.offload)
        checkpoints = self.folder.stage(name) / "checkpoints"
        if hosts.by_first(
            lambda: steps_in(checkpoints), "checkpoints"
        ):  # read from there: nothing to be made and freed
            state = abstract_state(optimizer, like, self.mesh, settings.offload)
        else:
            stays = "masters" not in settings.offload  # what moves to other memory cannot be donated
            state = jax.jit(begin, donate_argnums=0 if stays else ())(make())
        frozen = () if name == "finetune" else (self.models.teacher_of(settings),)
        state = train(state, on_host_batch, self.stream(name), self.folder.stage(name), settings, name)
        return state.params, figures

    def _finish(self, name: str, params: Params, summary: dict[str, Any]) -> None:
        def figures_of_all() -> dict[str, Any]:
            records = read_metrics(self.folder.stage(name))
            return training_figures(records) | {"records": len(records)}

        figures = hosts.by_first(figures_of_all, "figures")
        self.folder.finish(name, summary | figures | {"peak_memory_bytes": peak_memory_bytes()}, params)
