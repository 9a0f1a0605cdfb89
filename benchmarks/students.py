"""Text and students of the benchmarks that distil: float8_teacher.py and kl_curves.py."""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from shapes import quarter
from study_rows import StudyRows, batches_of

from jaxhybrid.data import open_text
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import StageConfig
from jaxhybrid.stages.align import linear_mixers
from jaxhybrid.stages.batch import Batch
from jaxhybrid.stages.programs import stage_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert, with_softmax_layers

BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {text}", flush=True)


def last_quarter(losses: np.ndarray) -> float:
    return float(np.mean(losses[-max(len(losses) // 4, 1) :]))


class TrainingText(Protocol):
    def training(self, stage: StageConfig, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches without end, the same for the same seed."""
        ...


class ConfigText:
    """That of a run."""

    def __init__(self, config: RunConfig, teacher: Model):
        self.text = open_text(config.data, teacher.folder, teacher.config.vocab_size)

    def heldout(self, options: argparse.Namespace) -> Iterable[dict[str, np.ndarray]]:
        return self.text.heldout_batches(options.length, options.rows, options.tokens)

    def training(self, stage: StageConfig, seed: int) -> Iterator[dict[str, np.ndarray]]:
        return self.text.training_batches(stage, seed)


class FileText:
    """What study_rows.py wrote."""

    def __init__(self, path: Path):
        self.study = StudyRows(path)

    def heldout(self, options: argparse.Namespace) -> Iterable[dict[str, np.ndarray]]:
        rows = self.study.text("heldout")
        count = -(-options.tokens // rows["tokens"].shape[1])
        return batches_of({name: array[:count] for name, array in rows.items()}, options.rows)

    def training(self, stage: StageConfig, seed: int) -> Iterator[dict[str, np.ndarray]]:
        rows, rng = self.study.text("train"), np.random.default_rng(seed)
        while True:
            yield from batches_of(rows, stage.batch_size, rng.permutation(len(rows["tokens"])))


class Students:
    """Hybrids of one teacher with every fourth layer softmax, by stages of a config."""

    def __init__(self, config: RunConfig, teacher: Model, text: TrainingText):
        self.config, self.text, self.dtype = config, text, jnp.dtype(config.dtype)
        self.frozen = jax.jit(lambda model: model.cast(self.dtype))(teacher)
        kind, depth = config.mixer.kind, teacher.config.num_layers
        make = partial(convert, layer_types=(kind,) * depth, mixer=config.mixer.to_model())
        self.linear = jax.jit(make)(teacher, rng=jax.random.key(config.seed))
        self.types = layer_types(depth, quarter(depth), kind)
        self.teacher = teacher

    def batches(self, stage: str, seed: int, steps: int) -> Iterator[Batch]:
        rows = self.text.training(getattr(self.config, stage), seed)
        return map(jax.device_put, islice(rows, steps))

    def trained(self, stage: str, student: Model, steps: int, seed: int, **changes: Any) -> tuple[Params, np.ndarray]:
        """What a stage leaves after so many steps, with these of its settings changed, and the losses of all steps."""
        settings = getattr(self.config, stage)
        changes |= {"tokens": steps * settings.tokens_per_step, "gradient_accumulation": 1}
        changes["warmup_steps"] = min(settings.warmup_steps, steps // 4)
        config = self.config.model_copy(update={stage: settings.model_copy(update=changes)})
        params = linear_mixers(student.params) if stage == "align" else student.params
        optimizer = make_optimizer(getattr(config, stage), params)
        step = stage_step(stage, config, student.config, optimizer)
        state = jax.jit(partial(start, optimizer=optimizer))(params)
        losses = []
        for batch in self.batches(stage, seed, steps):
            state, metrics = step(state, self.frozen, batch)
            losses.append(metrics["loss"])
        return state.params, np.array(jax.device_get(losses))

    def aligned(self, steps: int, **changes: Any) -> Model:
        """The hybrid that is distilled, in float32; changes as in `trained`."""
        linear = self.linear
        if steps:
            mixers, losses = self.trained("align", linear, steps, self.config.seed, **changes)
            say(f"aligned for {steps} steps: loss {last_quarter(losses):.4f}")
            linear = replace(linear, params={**linear.params, "mixers": mixers})
        return with_softmax_layers(linear, self.teacher, self.types)
