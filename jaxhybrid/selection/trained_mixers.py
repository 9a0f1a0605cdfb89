"""Linear mixers trained on the KL to the teacher while layers are chosen, with other layers softmax in every step."""

from collections.abc import Collection, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.masked import MaskedStudent, finite, trained_kl
from jaxhybrid.settings.stages import AlignConfig
from jaxhybrid.stages.align import linear_mixers
from jaxhybrid.stages.batch import Batch
from jaxhybrid.train.loop import HostBatch
from jaxhybrid.train.optimizer import TrainState, make_optimizer, start, update
from jaxhybrid.train.placement import place_batch


class MixerTraining:
    """A student whose linear mixers are trained, all else as it is. One program does it, whatever is softmax."""

    def __init__(self, student: MaskedStudent, settings: AlignConfig, remedy: str):
        """remedy: what to do when the KL is no number."""
        self._begun, self._remedy, self._steps = student, remedy, 0
        mixers = jax.tree.map(lambda w: w.astype(jnp.float32), linear_mixers(student.student.params))
        optimizer = make_optimizer(settings, mixers)

        def step(
            state: TrainState, mask: jax.Array, model: Model, teacher: Model, batch: Batch
        ) -> tuple[TrainState, jax.Array]:
            def loss(mixers: Params) -> jax.Array:
                own = _with_mixers(model, mixers)
                return trained_kl(own, mask, teacher, batch, dtype=student.dtype, chunk_tokens=student.chunk_tokens)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return update(state, gradients, optimizer)[0], value

        self._step = jax.jit(step, donate_argnums=0)
        self._state = jax.jit(partial(start, optimizer=optimizer))(mixers)

    def train(self, sets: Iterable[Collection[int]], batches: Iterator[HostBatch]) -> MaskedStudent:
        """The student after one more step for each of these sets of softmax layers."""
        begun = self._begun
        for kept, rows in zip(sets, batches):
            mask, batch = np.isin(np.arange(begun.depth), list(kept)), place_batch(rows, begun.mesh)
            self._state, value = self._step(self._state, mask, begun.student, begun.teacher, batch)
            finite(float(value), f"KL in training at step {self._steps}", self._remedy)
            self._steps += 1
        return begun.of(_with_mixers(begun.student, self._state.params))


def train_supernet(
    student: MaskedStudent, batches: Iterator[HostBatch], settings: AlignConfig, most: int, seed: int
) -> MaskedStudent:
    """Every step draws how many layers are softmax, 0 to `most`, and which."""
    rng = np.random.default_rng(seed)
    draws = (rng.permutation(student.depth)[: rng.integers(most + 1)] for _ in range(settings.steps))
    return MixerTraining(student, settings, "Lower select.supernet.learning_rate.").train(draws, batches)


def _with_mixers(student: Model, mixers: Params) -> Model:
    return Model({**student.params, "mixers": student.params["mixers"] | mixers}, student.config, student.folder)
