"""A whole run, stage after stage, each one skipped when its result is there and resumed when it is half done."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxhybrid.checksums import read_result, write_result
from jaxhybrid.config import RunConfig, differences, fingerprint, load_config, validate_against
from jaxhybrid.data import BatchIterator, batches, heldout_batches, mean_segment_tokens
from jaxhybrid.data.text import Text, open_text
from jaxhybrid.disk import DiskPlan, require, used_bytes
from jaxhybrid.errors import RunError
from jaxhybrid.evaluate.quality import evaluate_quality
from jaxhybrid.evaluate.recall import compare_recall
from jaxhybrid.evaluate.recall_prompts import RecallTask, recall_tasks
from jaxhybrid.export.folder import export, refuse_to_replace
from jaxhybrid.measure import peak_memory_bytes
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.params import Params, cast_params
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, declare
from jaxhybrid.report import evaluation_table, write_report
from jaxhybrid.run_folder import STAGES, RunFolder
from jaxhybrid.selection.kl_guided import ScoringConfig, score_candidates
from jaxhybrid.selection.methods import layer_types, select_layers
from jaxhybrid.selection.ranking import Scores, StabilityRule, layers_in_budget, read_scores
from jaxhybrid.settings import AlignConfig, GroupedStageConfig, StageConfig
from jaxhybrid.stages.align import align_loss, align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.train.loop import HostBatch, LoopConfig, train
from jaxhybrid.train.metrics import read_metrics, training_figures
from jaxhybrid.train.optimizer import OptimizerConfig, TrainState, make_optimizer, start
from jaxhybrid.train.placement import place_batch
from jaxhybrid.weights.convert import convert, resolve_mixer, with_softmax_layers
from jaxhybrid.weights.huggingface import load_teacher

FEW_TOKENS = 10_000_000  # below this, distillation has only begun
SAMPLED_TOKENS = 500_000  # of a stage's first batches, whose segments are measured


class Pipeline:
    """The stages of one run over one config. Use as a context: the mesh is active inside it."""

    def __init__(self, config: RunConfig, devices: Sequence[Any] | None = None):
        self.config = config
        self.folder = RunFolder.open(config)
        self.mesh = make_mesh(**config.mesh.model_dump(), devices=devices)
        self.dtype = jnp.dtype(config.dtype)

    def __enter__(self) -> "Pipeline":
        self._active = jax.set_mesh(self.mesh)
        self._active.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._active.__exit__(*error)

    # --- what the stages share

    @cached_property
    def teacher(self) -> Model:
        """The teacher in float32 on the mesh, checked against the config."""
        ignored = self.config.ignore_config_keys
        teacher = load_teacher(self.config.teacher, ignore_config_keys=ignored, mesh=self.mesh)
        validate_against(self.config, teacher.config)
        return teacher

    @cached_property
    def frozen_teacher(self) -> Model:
        """The teacher in the compute dtype: what stages run it in."""
        if self.dtype == jnp.float32:
            return self.teacher
        specs = declare(self.teacher.config)
        params = jax.jit(lambda params: cast_params(params, specs, self.dtype))(self.teacher.params)
        return Model(params, self.teacher.config, self.teacher.folder)

    @cached_property
    def depth(self) -> int:
        return self.teacher.config.num_layers

    @property
    def linear_kind(self) -> str:
        return self.config.mixer.kind

    def student_config(self, types: Sequence[str]) -> ModelConfig:
        mixer = resolve_mixer(self.teacher.config, self.config.mixer.to_model())
        return ModelConfig(**{**vars(self.teacher.config), "layer_types": tuple(types), "gated_deltanet": mixer})

    def converted(self) -> Model:
        """The all-linear student before any training. All but its mixers are the teacher's own arrays."""
        types = (self.linear_kind,) * self.depth
        mixer, config = self.config.mixer.to_model(), self.student_config(types)
        shardings = param_shardings(declare(config), self.mesh)["mixers"]
        make = jax.jit(
            lambda teacher, key: convert(teacher, types, mixer, key).params["mixers"], out_shardings=shardings
        )
        mixers = make(self.teacher, jax.random.key(self.config.seed))
        return Model({**self.teacher.params, "mixers": mixers}, config, self.teacher.folder)

    @cached_property
    def text(self) -> Text:
        """Training and held-out text, and the tokenizer; says once what stands round a document."""
        text = open_text(self.config.data, self.teacher.folder, self.teacher.config.vocab_size)
        print(f"text: {text.vocabulary.describe()}")
        return text

    def stream(self, stage: StageConfig, salt: int) -> BatchIterator:
        """The stage's training batches from their start; stages see different orders."""
        return batches(
            self.text.train.at_least(stage.min_document_tokens or 1),
            stage.sequence_length,
            stage.batch_size,
            self.config.seed * 1000 + salt,
            jax.process_index(),
            jax.process_count(),
            self.config.data.separate_documents,
        )

    def segment_tokens(self, name: str, stage: StageConfig, salt: int) -> float:
        """Mean length of a segment in the stage's first batches; said, for it bounds the context that is trained."""
        stream = self.stream(stage, salt)
        count = max(1, min(SAMPLED_TOKENS // stage.tokens_per_step, stage.steps))
        mean = round(mean_segment_tokens(islice(stream, count)), 1)
        stream.close()
        print(f"{name}: rows of {stage.sequence_length:,} tokens, a segment has {mean:,} on average")
        return mean

    def heldout(self, sequence_length: int, batch_size: int, tokens: int) -> Sequence[HostBatch]:
        return heldout_batches(
            self.text.heldout,
            sequence_length,
            batch_size,
            tokens,
            jax.process_index(),
            jax.process_count(),
            self.config.data.separate_documents,
        )

    @cached_property
    def recall_tasks(self) -> list[RecallTask]:
        """The prompts of the recall probe; refuses those that the teacher cannot read."""
        context = self.teacher.config.max_position_embeddings
        return recall_tasks(self.text.vocabulary, self.config.evaluate.recall, context)

    # --- stages

    def run(self) -> None:
        """Everything that is missing, in order, then the table and the paths."""
        # Refused now, not after hours of training.
        refuse_to_replace(self.export_folder, None, overwrite=False)
        self._require_disk_for_run()
        _ = self.recall_tasks
        self.align()
        if self.config.select.method == "kl_guided":
            self.score()
        self.select()
        self.distill()
        self.finetune()
        print(evaluation_table(self.evaluate()))
        exported = self.export()
        page = write_report(self.folder.path)
        note = budget_note(self.config)
        print(f"{note}exported to {exported}\nreport: {page}")

    def reuse(self, other: Path) -> None:
        """Takes over what another run has finished and this one would repeat; says what, and what not and why."""
        if jax.process_index() == 0:
            for stage, outcome in self.folder.reuse(other).items():
                print(f"reuse: {stage} {outcome}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"reuse {other}")

    def align(self) -> None:
        """Stage 1: the linear mixers of every layer learn the teacher's attention outputs."""
        if self.folder.is_done("align"):
            return
        self._require_disk("align")
        settings, student = self.config.align, self.converted()
        static: dict[str, Any] = {
            "teacher_config": self.teacher.config,
            "student_config": student.config,
            "dtype": self.dtype,
        }
        mixers = linear_mixers(student.params)
        optimizer = make_optimizer(optimizer_config(settings), mixers)
        step = partial(align_step, optimizer=optimizer, **static)
        rows = settings.batch_size // settings.gradient_accumulation
        batch = self.heldout(
            settings.sequence_length, rows, min(settings.tokens_per_step, self.text.heldout.num_tokens)
        )[0]
        placed = place_batch(batch, self.mesh)
        measure = jax.jit(partial(align_loss, **static))
        before = np.asarray(measure(mixers, self.frozen_teacher.params, placed))
        mixers, figures = self._train("align", settings, mixers, optimizer, step, salt=1)
        after = np.asarray(measure(mixers, self.frozen_teacher.params, placed))
        summary = figures | {
            "heldout_loss_before": float(before.mean()),
            "heldout_loss_after": float(after.mean()),
            "heldout_layer_loss_before": before.tolist(),
            "heldout_layer_loss_after": after.tolist(),
        }
        self._finish("align", mixers, summary)
        print(f"align: held-out loss {before.mean():.4f} before the first step, {after.mean():.4f} after the last")

    def aligned(self) -> Model:
        """The all-linear student with its trained mixers."""
        student = self.converted()
        trained = self.folder.load_params("align", linear_mixers(student.params))
        return Model({**student.params, "mixers": trained}, student.config, student.folder)

    def score(self, candidates: Sequence[int] | None = None) -> None:
        """Importance of every layer, or of some of them; the last one to be scored completes `scores.json`."""
        if self.folder.is_done("score"):
            return
        self._require_disk("score", candidates)
        settings, folder = self.config.score, self.folder.stage("score")
        stop, best = settings.stop_when_stable, layers_in_budget(self.config.select.budget, self.depth)
        rule = None if stop is None else StabilityRule(best, stop.window_tokens, stop.window, stop.jaccard)
        config = ScoringConfig(
            optimizer=optimizer_config(settings),
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            evaluate_every=settings.evaluate_every,
            checkpoint_every=settings.checkpoint_every,
            log_every=settings.log_every,
            microbatches=settings.gradient_accumulation,
            dtype=self.dtype,
            remat=settings.remat,
            chunk_tokens=settings.kl_chunk,
            keep_teacher_states=settings.keep_teacher_states,
            stop_when_stable=rule,
            stop_every=1 if stop is None else stop.every,
            rank_by=self.config.select.rank_by,
            kept_dtype=jnp.dtype(settings.kept_dtype),
        )
        segment_tokens = self.segment_tokens("score", settings, salt=2)
        begun_before = any((folder / name).exists() for name in ("scores", "candidates"))
        began = time.perf_counter()
        compiled = score_candidates(
            self.frozen_teacher,
            self.aligned(),
            config,
            lambda: self.stream(settings, salt=2),
            self.heldout(settings.sequence_length, settings.batch_size, settings.heldout_tokens),
            folder,
            self.mesh,
            range(self.depth) if candidates is None else candidates,
        )
        seconds = time.perf_counter() - began
        print(f"score: programs compiled for all candidates: {compiled}")
        missing = [i for i in range(self.depth) if not (folder / "scores" / f"{i:03d}.json").exists()]
        if missing:
            print(f"score: layers {missing} are still to be scored")
            return
        self.write_scores(read_scores(folder / "scores", self.depth))
        tokens = sum(c.heldout[-1][0] for c in self.scores().candidates)
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

    def merge_scores(self, other: Path) -> None:
        """Takes over the finished candidates of another run of the same config (scored on another machine, say).

        Raises:
            RunError: the other run was made by a config that gives other results, or has no scores.
        """
        theirs = load_config(other / "config.yaml", [])
        if fingerprint(theirs) != fingerprint(self.config):
            changed = "\n".join(f"  {line}" for line in differences(theirs, self.config))
            raise RunError(f"{other} was made with another config, so its scores do not compare:\n{changed}")
        files = sorted((other / "score" / "scores").glob("*.json"))
        if not files:
            raise RunError(f"{other} has no scores to merge: no candidate is finished there.")
        for file in files:
            write_result(self.folder.stage("score") / "scores" / file.name, read_result(file))

    def write_scores(self, scores: Scores) -> None:
        """`scores.json`: curves, ranking by either one, and, by the one that `select.rank_by` names, importance and
        stability for each budget to follow."""
        budgets = {str(b): layers_in_budget(b, self.depth) for b in self.config.score.budgets}
        by = self.config.select.rank_by
        write_result(
            self.folder.path / "scores.json",
            {
                "rank_by": by,
                "ranking": scores.ranking(by),
                "ranking_by_heldout_kl": scores.ranking("heldout"),
                "ranking_by_training_kl": scores.ranking("train"),
                "importance": {str(layer): value for layer, value in scores.importance(by).items()},
                "stability": {name: scores.stability(count, by) for name, count in budgets.items()},
                "candidates": [candidate.to_json() for candidate in scores.candidates],
            },
        )

    def scores(self) -> Scores:
        return read_scores(self.folder.stage("score") / "scores", self.depth)

    def select(self) -> tuple[int, ...]:
        """The layers that stay softmax; written to `layers.json` with what the choice rests on."""
        settings = self.config.select
        choose = partial(
            select_layers,
            settings.method,
            self.depth,
            layers=settings.layers or (),
            seed=settings.seed,
            uniform_by=settings.uniform,
            scores=self.scores,
            rank_by=settings.rank_by,
        )
        layers = choose(settings.budget)
        record: dict[str, Any] = {"method": settings.method, "budget": settings.budget, "softmax_layers": list(layers)}
        if settings.method == "kl_guided":
            scores, by = self.scores(), settings.rank_by
            record |= {
                "rank_by": by,
                "ranking": scores.ranking(by),
                "importance": {str(layer): value for layer, value in scores.importance(by).items()},
                "stability": scores.stability(len(layers), by),
            }
            self.write_scores(scores)  # those of another run were ranked as that one has it
        if settings.method != "explicit":
            record["other_budgets"] = {str(b): list(choose(b)) for b in self.config.score.budgets}
        write_result(self.folder.path / "layers.json", record)
        print(f"select: {settings.method} keeps layers {list(layers)} softmax")
        return layers

    def hybrid(self) -> Model:
        """The student to distill: the teacher, with aligned mixers wherever a layer is not kept softmax."""
        kept = self.folder.read("layers.json", "select")["softmax_layers"]
        types = layer_types(self.depth, kept, self.linear_kind)
        return with_softmax_layers(self.aligned(), self.teacher, types)

    def distill(self) -> None:
        """Stage 2: KL to the teacher, all parameters."""
        if self.folder.is_done("distill"):
            return
        self._require_disk("distill")
        settings, student = self.config.distill, self.hybrid()
        optimizer = make_optimizer(optimizer_config(settings), student.params)
        step = partial(
            distill_step,
            teacher_config=self.teacher.config,
            student_config=student.config,
            optimizer=optimizer,
            dtype=self.dtype,
            remat=settings.remat,
            chunk_tokens=settings.kl_chunk,
        )
        self._finish("distill", *self._train("distill", settings, student.params, optimizer, step, salt=3))

    def finetune(self) -> None:
        """Stage 3: cross entropy, usually at a longer context."""
        if self.folder.is_done("finetune"):
            return
        self._require_disk("finetune")
        settings, student = self.config.finetune, self.hybrid()
        params = self.folder.load_params("distill", student.params)
        optimizer = make_optimizer(optimizer_config(settings), params)

        def step(state: TrainState, _: Params, batch: dict[str, jax.Array]) -> Any:
            return finetune_step(
                state, batch, student_config=student.config, optimizer=optimizer, dtype=self.dtype, remat=settings.remat
            )

        self._finish("finetune", *self._train("finetune", settings, params, optimizer, step, salt=4))

    def student(self, stage: str | None = None) -> Model:
        """The trained hybrid, after the given stage or the last one done."""
        stage = stage or next((s for s in ("finetune", "distill") if self.folder.is_done(s)), None)
        if stage is None:
            raise RunError(f"{self.folder.path} has no trained student yet. Run `jaxhybrid distill CONFIG` first.")
        hybrid = self.hybrid()
        return Model(self.folder.load_params(stage, hybrid.params), hybrid.config, hybrid.folder)

    def evaluate(self) -> dict[str, Any]:
        """Teacher and students on held-out text and recall; written to `evaluation.json`."""
        settings = self.config.evaluate
        heldout = self.heldout(settings.sequence_length, settings.batch_size, settings.heldout_tokens)
        rows: dict[str, dict[str, Any]] = {"teacher": {"kl": 0.0}}
        models = {"teacher": self.frozen_teacher} | {
            stage: self.student(stage) for stage in ("distill", "finetune") if self.folder.is_done(stage)
        }
        for name, model in models.items():
            quality = evaluate_quality(model, self.frozen_teacher, heldout, self.mesh, self.dtype)
            rows[name] = {key: quality[key] for key in ("perplexity", "kl", "tokens")}
        layers = self.folder.path / "layers.json"
        result = {
            "models": rows,
            "softmax_layers": self.folder.read("layers.json", "select")["softmax_layers"] if layers.exists() else None,
            "heldout_tokens": settings.heldout_tokens,
            "recall": compare_recall(
                models,
                self.recall_tasks,
                batch_tokens=settings.batch_size * settings.sequence_length,
                dtype=self.dtype,
            ),
        }
        write_result(self.folder.path / "evaluation.json", result)
        return result

    @property
    def export_folder(self) -> Path:
        return Path(self.config.export.folder or self.folder.path / "export").expanduser().absolute()

    def export(self, folder: str | None = None, overwrite: bool = False) -> Path:
        """The Hugging Face folder of the trained student. `overwrite` replaces what is no earlier export, too."""
        settings = self.config.export
        target = Path(folder or self.export_folder)
        refuse_to_replace(target, None, overwrite)  # before anything is loaded
        require("export", self.disk.needs("export"), 0, target)
        student = jax.device_get(self.student())
        size = shard_bytes(settings.max_shard)
        return export(student, target, settings.dtype, max_shard_bytes=size, overwrite=overwrite)

    # --- disk

    @cached_property
    def disk(self) -> DiskPlan:
        linear = self.student_config((self.linear_kind,) * self.depth)
        kept = layers_in_budget(self.config.select.budget, self.depth)
        return DiskPlan(self.config, linear, linear.with_layers((FULL_ATTENTION,) * kept + linear.layer_types[kept:]))

    def _require_disk(self, stage: str, candidates: Sequence[int] | None = None) -> None:
        folder = self.folder.stage(stage)
        require(stage, self.disk.needs(stage, candidates), used_bytes([folder]), folder)

    def _require_disk_for_run(self) -> None:
        scored = self.config.select.method == "kl_guided"
        stages = [stage for stage in STAGES if not self.folder.is_done(stage) and (stage != "score" or scored)]
        if stages:
            there = used_bytes(map(self.folder.stage, stages))
            exported = [] if self.config.export.folder else ["export"]
            stage, needs = self.disk.most([*stages, *exported])
            require(f"the run, most of it at {stage},", needs, there, self.folder.path)

    # --- the training that three stages share

    def _train(
        self,
        name: str,
        settings: StageConfig,
        params: Params,
        optimizer: Any,
        step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
        salt: int,
    ) -> tuple[Params, dict[str, Any]]:
        """Trained parameters, and what the stage's record says beside what its metrics do."""
        figures = {"mean_segment_tokens": self.segment_tokens(name, settings, salt)}
        teacher = self.frozen_teacher.params
        compiled = jax.jit(step, donate_argnums=0)

        def on_host_batch(state: TrainState, batch: HostBatch) -> tuple[TrainState, dict[str, jax.Array]]:
            return compiled(state, teacher, place_batch(batch, self.mesh, settings.gradient_accumulation))

        begin = jax.jit(lambda params: start(jax.tree.map(jnp.copy, params), optimizer))
        loop = LoopConfig(
            settings.steps, settings.tokens_per_step, settings.checkpoint_every, settings.log_every, label=name
        )
        state = train(begin(params), on_host_batch, self.stream(settings, salt), self.folder.stage(name), loop)
        return state.params, figures

    def _finish(self, name: str, params: Params, summary: dict[str, Any]) -> None:
        figures = training_figures(read_metrics(self.folder.stage(name)))
        self.folder.finish(name, summary | figures | {"peak_memory_bytes": peak_memory_bytes()}, params)


def budget_note(config: RunConfig) -> str:
    """What a run far below the papers' budget can and cannot show; empty for one that is not."""
    distilled, scored = config.distill.tokens, config.score.tokens
    if distilled >= FEW_TOKENS:
        return ""
    return (
        f"\nThis run distilled on {distilled:,} tokens and scored each layer on {scored:,}; the papers use 600 and 200 "
        "million.\nIt shows that every stage works, that the losses fall, and that the export loads. It does not show\n"
        "how good such a hybrid is, and the choice of layers is mostly noise: judge neither by this table.\n\n"
    )


def optimizer_config(stage: StageConfig) -> OptimizerConfig:
    """A stage's settings as the optimizer's. Alignment trains mixers only: its one rate is theirs."""
    if isinstance(stage, GroupedStageConfig):
        mixer_rates = stage.mixer_learning_rate, stage.final_mixer_learning_rate
    else:
        assert isinstance(stage, AlignConfig)
        mixer_rates = stage.learning_rate, stage.final_learning_rate
    return OptimizerConfig(
        total_steps=stage.steps,
        learning_rate=stage.learning_rate,
        mixer_learning_rate=mixer_rates[0],
        final_learning_rate=stage.final_learning_rate,
        final_mixer_learning_rate=mixer_rates[1],
        schedule=stage.schedule,
        warmup_steps=stage.warmup_steps,
        betas=stage.betas,
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def shard_bytes(size: str) -> int:
    """'5GB' -> bytes, in powers of ten."""
    return int(size[:-2]) * {"MB": 10**6, "GB": 10**9}[size[-2:]]
