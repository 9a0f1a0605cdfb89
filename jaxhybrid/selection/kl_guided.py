"""Scoring the layers: every candidate trained on the same batches by the same program, resumable anywhere."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid import hosts
from jaxhybrid.checksums import read_result
from jaxhybrid.errors import ConfigError, DamageError, DivergenceError
from jaxhybrid.files import remove
from jaxhybrid.model.head import Head
from jaxhybrid.model.partition import own_share
from jaxhybrid.model.transformer import Model, hidden_states
from jaxhybrid.selection.kept_state import KeptState
from jaxhybrid.selection.masked import Texts
from jaxhybrid.selection.ranking import SCORE_AGAIN, CandidateScore, Curve, read_scores, write_score
from jaxhybrid.selection.teacher_cache import TeacherCache, cache_path, remove_caches
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import ScoreConfig
from jaxhybrid.stages.batch import Batch
from jaxhybrid.stages.programs import stage_step, trained_params
from jaxhybrid.stages.score import candidate_kl, candidate_params
from jaxhybrid.train.loop import Batches, HostBatch, train
from jaxhybrid.train.metrics import read_metrics
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.train.placement import local_part, place_batch


def score_candidates(
    teacher: Model,
    student: Model,
    config: RunConfig,
    batches: Callable[[], Batches],
    heldout: Texts,
    folder: Path,
    mesh: Mesh,
    candidates: Sequence[int],
) -> dict[str, int]:
    """Trains every candidate in `candidates` and writes `folder/scores/LLL.json` for each.

    Args:
        teacher: parameters placed on `mesh`.
        student: the aligned all-linear student, placed on `mesh`.
        config: its `score`, `dtype`, and of `select` what ends scoring early: `budget` and `rank_by`.
        batches: opens the training stream from its start; every candidate sees the same one.
        heldout: what importance is measured on, all in rows of one shape: text, and recall prompts if they count.

    Returns:
        How many programs were compiled for each function: 1 each, whatever the number of candidates.
    """
    depth = student.config.num_layers
    outside = [layer for layer in candidates if not 0 <= layer < depth]
    if outside:
        raise ConfigError(f"Candidates {outside} do not exist; the model's layers are 0 to {depth - 1}.")
    rule = config.score.stop_when_stable
    if rule is not None and len(candidates) < depth:
        raise ConfigError("Stopping when the ranking is stable needs all candidates in one process; drop --candidates.")
    hosts.by_first(lambda: remove_caches(folder, candidates), "remove caches")
    programs = _Programs(teacher, student, config, mesh, folder, candidates)
    best, rounds = layers_in_budget(config.select.budget, depth), rounds_of(config.score)
    for position, steps in enumerate(rounds):
        for count, layer in enumerate(candidates):
            label = f"score layer {layer} ({count + 1} of {len(candidates)})"
            score = _read_score(folder, layer)
            if score is None or score.heldout[-1][0] < steps * config.score.tokens_per_step:
                _train_candidate(programs, layer, rounds[: position + 1], batches, heldout, label)
            if position + 1 == len(rounds):  # else the next round goes on from there
                programs.remove_candidate(layer)
        last = position + 1 == len(rounds)
        if rule and not last and hosts.by_first(lambda: _is_stable(config, folder, depth, best), "is stable"):
            lasted = f"{rule.window} rounds" if rule.window else f"{rule.window_tokens:,} tokens"
            hosts.say(f"The top {best} layers have not moved for {lasted}: stopping.")
            break
    for layer in candidates:
        programs.remove_candidate(layer)
    programs.close()
    return programs.compiled()


def rounds_of(settings: ScoreConfig) -> list[int]:
    """Steps at which every candidate waits for all others. The first that can end scoring is the first of them."""
    every, rule = settings.evaluate_every, settings.stop_when_stable
    if rule is None:
        return [settings.steps]
    window = rule.evaluations(every * settings.tokens_per_step)
    return [*range(every * (window + 1), settings.steps, every * rule.every), settings.steps]


def _is_stable(config: RunConfig, folder: Path, depth: int, best: int) -> bool:
    rule = config.score.stop_when_stable
    return rule is not None and read_scores(folder / "scores", depth).is_stable(rule, best, config.select.rank_by)


def _read_score(folder: Path, layer: int) -> CandidateScore | None:
    """What a candidate was given at the end of a round, if one has ended."""
    file = folder / "scores" / f"{layer:03d}.json"
    found = hosts.by_first(lambda: read_result(file, SCORE_AGAIN) if file.exists() else None, f"score of {layer}")
    return None if found is None else CandidateScore.from_json(found)


def _train_candidate(
    programs: "_Programs",
    layer: int,
    rounds: Sequence[int],
    batches: Callable[[], Batches],
    heldout: Texts,
    label: str,
) -> None:
    """Takes the candidate to the end of the last of `rounds`, from where it was left, and writes its score."""
    settings = programs.settings
    folder = programs.candidate_folder(layer)
    index = jnp.int32(layer)

    def step(state: Any, batch: HostBatch) -> tuple[Any, dict[str, jax.Array]]:
        number = int(batch["number"])
        own = {name: x for name, x in batch.items() if name != "number"}
        own = programs.with_teacher("train", number, own, settings.steps)
        placed = place_batch(own, programs.mesh, settings.gradient_accumulation)
        return programs.step(state, index, placed, programs.teacher_head)

    def measure(state: Any, done: int) -> dict[str, Any] | None:
        if done % settings.evaluate_every and done != settings.steps:
            return None
        return {"heldout_kl": programs.heldout_kl(state.params, index, heldout)}

    def begin() -> Any:
        return programs.begin(programs.student, programs.teacher, index)

    earlier = _read_score(programs.folder, layer)  # of the round before
    untrained = earlier.heldout[0][1] if earlier else programs.heldout_kl(begin().params, index, heldout)

    def run() -> None:
        kept = KeptState(folder, jnp.dtype(settings.kept_dtype), begin)
        for steps in rounds:
            if kept.step >= steps:
                continue
            stream = _Numbered(batches())
            state = train(
                kept.restore(stream), step, stream, folder, settings, label,
                until=steps, keep_last=False, measure=measure,
            )  # fmt: skip
            if steps < settings.steps:  # after the last round the score is all that is kept
                kept.save(state, stream)

    def record() -> None:
        records = read_metrics(folder)
        if not records or records[-1]["step"] != rounds[-1] or "heldout_kl" not in records[-1]:
            raise DamageError(f"{folder / 'metrics.jsonl'} has lost its end.")
        heldout_curve: Curve = [(r["tokens"], r["heldout_kl"]) for r in records if "heldout_kl" in r]
        score = CandidateScore(
            layer,
            train=[(r["tokens"], r["loss"]) for r in records if "loss" in r],
            heldout=[(0, untrained), *heldout_curve],
        )
        write_score(programs.folder / "scores", score)

    def run_and_record() -> None:
        run()
        hosts.by_first(record, f"write the score of {layer}")

    try:
        run_and_record()
    except DamageError as error:
        warnings.warn(f"{error} The candidate of layer {layer} starts over.", stacklevel=2)
        programs.remove_candidate(layer)
        run_and_record()


def _kl_and_tokens(params: Any, layer: jax.Array, batch: Batch, teacher_head: Head, **static: Any) -> Any:
    """Both over all processes' rows, of the tokens that are `counted`."""
    kl = candidate_kl(params, layer, batch, teacher_head, counted=batch["counted"], **static)
    return kl, jnp.sum(batch["counted"])


class _Numbered:
    """A batch stream that also numbers its batches, so that the teacher's states can be found again."""

    def __init__(self, batches: Batches):
        self.batches, self.number = batches, 0

    def __next__(self) -> HostBatch:
        batch = {**next(self.batches), "number": np.asarray(self.number)}
        self.number += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"number": self.number, "batches": self.batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        self.batches.set_state(state["batches"])


class _Programs:
    """The compiled functions that all candidates share."""

    def __init__(
        self, teacher: Model, student: Model, config: RunConfig, mesh: Mesh, folder: Path, candidates: Sequence[int]
    ):
        self.teacher, self.student, self.settings, self.mesh = teacher, student, config.score, mesh
        self.folder, self.candidates, self.dtype = folder, candidates, jnp.dtype(config.dtype)
        assert not student.config.softmax_layers
        optimizer = make_optimizer(self.settings, trained_params("score", student.config, teacher.config, mesh))
        static: dict[str, Any] = {
            "config": student.config,
            "dtype": self.dtype,
            "chunk_tokens": self.settings.kl_chunk,
        }

        def begin(own: Model, teacher: Model, layer: jax.Array) -> Any:
            return start(candidate_params(own, teacher, layer), optimizer, offload=self.settings.offload)

        self.begin = jax.jit(begin)
        self.step = stage_step("score", config, student.config, optimizer)
        self._heldout = jax.jit(partial(_kl_and_tokens, **static))
        self._teacher = jax.jit(
            lambda teacher, batch: hidden_states(teacher, batch["tokens"], batch["segment_ids"], dtype=self.dtype)
        )
        self._caches: dict[str, TeacherCache] = {}
        self.teacher_head = jax.jit(lambda teacher: teacher.head.astype(self.dtype))(teacher)

    def candidate_folder(self, layer: int) -> Path:
        return self.folder / "candidates" / f"{layer:03d}"

    def remove_candidate(self, layer: int) -> None:
        hosts.by_first(lambda: remove(self.candidate_folder(layer)), f"remove candidate {layer}")

    def cache(self, name: str, batches: int, rows: int) -> TeacherCache:
        """This process's own, for its `rows` of each batch."""
        if name not in self._caches:
            self._caches[name] = TeacherCache(
                cache_path(self.folder, name, self.candidates, jax.process_index()),
                batches,
                rows,
                self.settings.sequence_length // own_share(self.mesh, "context")[1],
                self.teacher.config.hidden_size,
                self.dtype,
            )
        return self._caches[name]

    def close(self) -> None:
        """Removes this process's caches."""
        for cache in self._caches.values():
            cache.delete()

    def parts(self, batch: HostBatch) -> list[HostBatch]:
        """This process's rows of a batch, as many at a time as an update runs."""
        rows = len(batch["tokens"]) // self.settings.gradient_accumulation
        return [
            {name: x[part * rows : (part + 1) * rows] for name, x in batch.items()}
            for part in range(self.settings.gradient_accumulation)
        ]

    def with_teacher(self, name: str, index: int, batch: HostBatch, batches: int) -> HostBatch:
        """The batch with `teacher_hidden` added, computed the first time this batch is seen by any candidate."""

        def compute() -> np.ndarray:
            text = {name: batch[name] for name in ("tokens", "segment_ids")}
            states = (self._teacher(self.teacher, place_batch(part, self.mesh)) for part in self.parts(text))
            return np.concatenate([local_part(part) for part in states])

        kept = name != "train" or self.settings.keep_teacher_states
        if not kept:
            return {**batch, "teacher_hidden": compute()}

        def everywhere(found: bool) -> bool:
            return all(hosts.gather(found, f"states of {name} {index}"))

        hidden = self.cache(name, batches, len(batch["tokens"])).get(index, compute, everywhere)
        return {**batch, "teacher_hidden": np.asarray(hidden)}

    def heldout_kl(self, params: Any, layer: jax.Array, heldout: Texts) -> float:
        """Mean KL in nats per token that counts, over the held-out batches; of several texts, each by its share."""
        mean = 0.0
        for name, (share, batches) in zip(("heldout", "answers"), heldout):
            total, tokens = 0.0, 0.0
            for index, own in enumerate(batches):
                counted = own.get("counted", (own["segment_ids"] != 0).astype(np.float32))
                batch = self.with_teacher(name, index, {**own, "counted": counted}, len(batches))
                for part in self.parts(batch):
                    kl, count = self._heldout(params, layer, place_batch(part, self.mesh), self.teacher_head)
                    total += float(kl)
                    tokens += float(count)
            mean += share * total / tokens
        if not math.isfinite(mean):
            raise DivergenceError(
                f"The held-out KL of the candidate of layer {int(layer)} is {mean}. Lower score.learning_rate and "
                "score.mixer_learning_rate; if the first measurement says so, align again at a lower rate."
            )
        return mean

    def compiled(self) -> dict[str, int]:
        """How many executables each function has been compiled to."""
        used: dict[str, Any] = {"train_step": self.step, "heldout_kl": self._heldout, "teacher_forward": self._teacher}
        return {name: function._cache_size() for name, function in used.items()}
