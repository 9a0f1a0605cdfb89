"""A candidate between two rounds: what comes back is what was kept, and which of several states counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.selection.kept_state import KeptState
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.optimizer import TrainState, make_optimizer, start
from tests.tiny import training

RNG = np.random.default_rng(0)
START = {"w": jnp.asarray(RNG.normal(size=(30, 20)), jnp.float32)}


def begin():
    return start(START, make_optimizer(training(9), START))


def trained(step):
    """A state in which everything has changed a little."""
    state = begin()
    params = jax.tree.map(lambda x: x + 1e-3 * jnp.asarray(RNG.normal(size=x.shape), jnp.float32), state.params)
    moments = jax.tree.map(
        lambda x: jnp.asarray(RNG.uniform(1, 2, x.shape), x.dtype) if x.ndim else x + step, state.optimizer
    )
    return TrainState(jnp.int32(step), params, moments)


class Place:
    """A stream that is only somewhere."""

    place = 0

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def at(place):
    stream = Place()
    stream.place = place
    return stream


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_comes_back(tmp_path, dtype):
    state, stream = trained(2), Place()
    KeptState(tmp_path, dtype, begin).save(state, at(17))
    kept = KeptState(tmp_path, dtype, begin)
    assert kept.step == 2
    found = kept.restore(stream)
    assert stream.place == 17
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, state)
    change = jax.tree.map(lambda now, then: now - then, found.params, START)
    expected = jax.tree.map(lambda now, then: now - then, state.params, START)
    # bfloat16 has 8 significant bits; adding a change of 1e-3 to a weight of about 1 costs 1e-7.
    rounding = {"rtol": 0} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 3e-7}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **rounding), change, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **rounding), found.optimizer, state.optimizer)
    exact = jax.tree.map(np.array_equal, found.params, state.params)
    assert exact == {"w": dtype == jnp.float32}


def test_a_round_that_is_over_goes_on_from_what_was_kept_and_a_newer_one_from_its_checkpoint(tmp_path):
    KeptState(tmp_path, jnp.bfloat16, begin).save(trained(2), at(2))
    kept = KeptState(tmp_path, jnp.bfloat16, begin)
    expected = kept.restore(Place())
    within = Checkpoints(tmp_path / "checkpoints")
    within.save(2, trained(2), {}, wait=True)  # left by a process that was killed before it removed this
    jax.tree.map(np.testing.assert_array_equal, kept.restore(Place()), expected)
    assert not within.folder.exists()
    Checkpoints(tmp_path / "checkpoints").save(3, trained(3), {}, wait=True)
    stream = Place()
    assert int(kept.restore(stream).step) == stream.place == 0  # the loop has the newer state and its place
