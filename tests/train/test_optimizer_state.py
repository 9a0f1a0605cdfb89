"""Optimizers with less state, and state in the host's memory: what they hold, and that they train as AdamW does."""

from contextlib import closing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.partition import HOST_MEMORY, make_mesh, near
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.optimizer import make_optimizer, start, update
from tests.tiny import training

STEPS, WIDTH = 30, 256


def train(**settings):
    """(losses, state) of a linear map that learns another one, split over eight devices."""
    mesh = make_mesh(fsdp=8)
    keys = jax.random.split(jax.random.key(0), 3)
    target, x = (np.asarray(jax.random.normal(key, (WIDTH, WIDTH))) for key in keys[:2])
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    params = {"blocks": {"proj": {"kernel": jax.device_put(jnp.zeros((1, WIDTH, WIDTH)), sharding)}}}
    optimizer = make_optimizer(training(STEPS, learning_rate=0.05, clip_norm=None, **settings), params)

    def step(state):
        def loss(params):
            weight = near(params["blocks"]["proj"]["kernel"])[0]
            y = jnp.einsum("bi,oi->bo", x, weight, out_sharding=jax.P(None, "fsdp"))
            return jnp.mean((y - x @ target.T) ** 2) / WIDTH

        value, gradients = jax.value_and_grad(loss)(state.params)
        return update(state, near(gradients), optimizer)[0], value

    losses = []
    with jax.set_mesh(mesh):
        begin = partial(start, optimizer=optimizer, offload=settings.get("offload", ()))
        state = jax.jit(begin, donate_argnums=() if "masters" in settings.get("offload", ()) else 0)(params)
        compiled = jax.jit(step, donate_argnums=0)
        for _ in range(STEPS):
            state, loss = compiled(state)
            losses.append(float(loss))
    assert compiled._cache_size() == 1  # the state comes out as it went in
    return np.array(losses), state


@pytest.fixture(scope="module")
def adamw():
    return train()


@pytest.mark.parametrize(
    ("settings", "bytes_each"),
    [({}, 12), ({"moment_dtype": "bfloat16"}, 10), ({"optimizer": "adafactor"}, 4.03)],
)  # fmt: skip
def test_less_state_trains_as_well(settings, bytes_each, adamw):
    losses, state = train(**settings) if settings else adamw
    assert losses[-1] < 0.3 * losses[0]
    assert losses.mean() <= 1.01 * adamw[0].mean()
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer))) / WIDTH**2
    assert held == pytest.approx(bytes_each, rel=0.01)
    assert held <= training(STEPS, **settings).state_bytes * 1.01


@pytest.mark.parametrize("offload", [("moments",), ("moments", "masters")])
def test_what_is_offloaded_is_the_same(offload, adamw, tmp_path):
    losses, state = train(offload=offload)
    assert losses.tolist() == adamw[0].tolist()
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.optimizer) if x.ndim}
    assert kinds == {HOST_MEMORY}
    kept = HOST_MEMORY if "masters" in offload else "device"
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {kept}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
    restored, _ = Checkpoints(tmp_path).restore(state)
    for old, new, plain in zip(*map(jax.tree.leaves, (state, restored, adamw[1])), strict=True):
        assert new.sharding == old.sharding
        np.testing.assert_array_equal(new, old)
        np.testing.assert_array_equal(new, plain)
