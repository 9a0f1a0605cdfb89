"""One training of the linear mixers for every set of softmax layers: each step draws the layers that are softmax."""

from collections.abc import Iterator
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


def train_supernet(
    student: MaskedStudent, batches: Iterator[HostBatch], settings: AlignConfig, most: int, seed: int
) -> MaskedStudent:
    """The student with its linear mixers trained on the KL to the teacher, all else as it is.

    Every step draws how many layers are softmax, 0 to `most`, and which; that is traced, so one program does it.
    """

    def step(
        state: TrainState, mask: jax.Array, model: Model, teacher: Model, batch: Batch
    ) -> tuple[TrainState, jax.Array]:
        def loss(mixers: Params) -> jax.Array:
            own = _with_mixers(model, mixers)
            return trained_kl(own, mask, teacher, batch, dtype=student.dtype, chunk_tokens=student.chunk_tokens)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return update(state, gradients, optimizer)[0], value

    mixers = jax.tree.map(lambda w: w.astype(jnp.float32), linear_mixers(student.student.params))
    optimizer = make_optimizer(settings, mixers)
    state = jax.jit(partial(start, optimizer=optimizer))(mixers)
    compiled, rng = jax.jit(step, donate_argnums=0), np.random.default_rng(seed)
    for number, rows in zip(range(settings.steps), batches):
        kept = rng.permutation(student.depth)[: rng.integers(most + 1)]
        mask, batch = np.isin(np.arange(student.depth), kept), place_batch(rows, student.mesh)
        state, value = compiled(state, mask, student.student, student.teacher, batch)
        finite(float(value), f"KL of the supernet at step {number}", "Lower select.supernet.learning_rate.")
    return student.of(_with_mixers(student.student, state.params))


def _with_mixers(student: Model, mixers: Params) -> Model:
    return Model({**student.params, "mixers": student.params["mixers"] | mixers}, student.config, student.folder)
