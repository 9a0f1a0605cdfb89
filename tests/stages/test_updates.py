"""Two updates of every stage against the method written out: dense losses, plain autodiff, and AdamW in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.transformer import Model, forward, hidden_states
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.stages.score import candidate_params, score_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher
from tests.oracles import AdamW, plain_alignment
from tests.tiny import training

F = FULL_ATTENTION
STEPS = 2
LAYER = 1  # the candidate's softmax layer
# Everything acts at once: warm-up, a falling rate, clipping, decay. The large eps keeps an update proportional to its
# gradient: with none it is the sign of rounding noise where the gradient is nearly zero.
SETTINGS = training(
    3,
    learning_rate=1e-3,
    mixer_learning_rate=1e-2,
    final_learning_rate=1e-4,
    final_mixer_learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=1,
    betas=(0.8, 0.9),
    eps=1e-2,
    weight_decay=0.1,
    clip_norm=0.2,
)


@pytest.fixture(scope="module")
def teacher():
    return make_teacher(num_layers=3, vocab_size=31, hidden_size=16, intermediate_size=24)


@pytest.fixture(scope="module", params=[GatedDeltaNetConfig(), GLAConfig()], ids=lambda mixer: mixer.kind)
def mixer(request):
    return request.param


@pytest.fixture(scope="module")
def linear(teacher, mixer):
    return convert(teacher, (mixer.kind,) * 3, mixer, jax.random.key(1))


@pytest.fixture(scope="module")
def hybrid(teacher, mixer):
    return convert(teacher, (mixer.kind, F, mixer.kind), mixer, jax.random.key(1))


def uneven_batches():
    """Per update, four microbatches of two rows with 2 to 48 tokens: a mean of their means is not the mean."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        segments = np.zeros((8, 24), np.int32)
        for row, length in enumerate((24, 24, 20, 9, 2, 0, 3, 17)):
            segments[row, :length] = 1
            segments[row, length // 3 : length] = 2
        tokens = rng.integers(0, 31, segments.shape).astype(np.int32) * (segments != 0)
        yield {"tokens": tokens, "segment_ids": segments}


def log_probabilities(params, config, batch):
    return jax.nn.log_softmax(forward(Model(params, config), batch["tokens"], batch["segment_ids"]))


def dense_kl(params, config, teacher, batch):
    log_p = log_probabilities(teacher.params, teacher.config, batch)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_probabilities(params, config, batch)), -1)
    mask = batch["segment_ids"] != 0
    return jnp.sum(kl * mask) / mask.sum()


def dense_cross_entropy(params, config, batch):
    log_q = log_probabilities(params, config, batch)[:, :-1]
    chosen = jnp.take_along_axis(log_q, batch["tokens"][:, 1:, None], -1)[..., 0]
    segments = batch["segment_ids"]
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return -jnp.sum(chosen * mask) / mask.sum()


def as_hybrid(candidate):
    """A candidate's parameters as those of the hybrid it stands for: without the linear mixer it does not use."""
    kept = [row for row in range(3) if row != LAYER]
    rows = {kind: jax.tree.map(lambda w: w[jnp.array(kept)], stack) for kind, stack in candidate["mixers"].items()}
    return {**candidate, "mixers": rows | {F: candidate["mixers"][F]}}


def stage(name, teacher, linear, hybrid):
    """(what trains at first, step(state, batch), the same loss as one dense expression)."""
    dtype = {"dtype": jnp.float32}
    if name == "align":
        static = {"config": linear.config} | dtype
        return (
            linear_mixers(linear.params),
            lambda state, batch, optimizer: align_step(state, teacher, batch, optimizer=optimizer, **static),
            lambda mixers, batch: jnp.mean(plain_alignment(mixers, teacher, linear.config, batch)),
        )
    if name == "score":
        hidden_of = jax.vmap(lambda b: hidden_states(teacher, b["tokens"], b["segment_ids"]))
        head = teacher.head

        def step(state, batch, optimizer):
            static = {"config": linear.config, "optimizer": optimizer} | dtype
            return score_step(state, jnp.int32(LAYER), batch | {"teacher_hidden": hidden_of(batch)}, head, **static)

        return (
            candidate_params(linear, teacher, jnp.int32(LAYER)),
            step,
            lambda params, batch: dense_kl(as_hybrid(params), hybrid.config, teacher, batch),
        )
    if name.startswith("distill"):
        static = {"config": hybrid.config, "unroll": "unrolled" in name} | dtype
        return (
            hybrid.params,
            lambda state, batch, optimizer: distill_step(state, teacher, batch, optimizer=optimizer, **static),
            lambda params, batch: dense_kl(params, hybrid.config, teacher, batch),
        )
    return (
        hybrid.params,
        partial(finetune_step, config=hybrid.config, unroll="unrolled" in name, **dtype),
        lambda params, batch: dense_cross_entropy(params, hybrid.config, batch),
    )


@pytest.mark.parametrize(
    "name",
    [
        "align", "score", "distill", "finetune", "distill unrolled",
        pytest.param("finetune unrolled", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_two_updates_equal_the_method_written_out(name, teacher, linear, hybrid):
    """Two, since a student that wrongly reads its own head for the teacher's differs only once the head has moved."""
    params, step, loss = stage(name, teacher, linear, hybrid)
    optimizer = make_optimizer(SETTINGS, params)
    step, gradients = jax.jit(partial(step, optimizer=optimizer)), jax.jit(jax.value_and_grad(loss))
    state, expected = start(params, optimizer), AdamW(params, SETTINGS)
    for batch in uneven_batches():
        value, gradient = gradients(expected.params32(), batch)
        state, metrics = step(state, jax.tree.map(lambda x: x.reshape(4, 2, -1), batch))
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
        np.testing.assert_allclose(metrics["gradient_norm"], expected.update(gradient), rtol=1e-4)
    for (path, actual), wanted, first in zip(
        jax.tree_util.tree_leaves_with_path(state.params), expected.leaves, jax.tree.leaves(params), strict=True
    ):
        moved, wanted_move = (np.asarray(x, np.float64) - np.asarray(first, np.float64) for x in (actual, wanted))
        where = jax.tree_util.keystr(path)
        assert np.abs(wanted_move).max() > 1e-6, f"{where} does not move at all"
        rounding = 3 * np.spacing(np.float32(np.abs(wanted).max()))  # of float32 parameters, in two updates
        bound = 2e-3 * np.abs(wanted_move).max() + rounding
        np.testing.assert_allclose(moved, wanted_move, rtol=0, atol=bound, err_msg=where)
