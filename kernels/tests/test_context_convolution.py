"""The short convolution split over a mesh axis: results and gradients equal those of the whole sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxhybrid_kernels import context_short_convolution, short_convolution

SHARDS, TOKENS, CHANNELS = 8, 24, 5  # three tokens a shard
MESH = jax.make_mesh((SHARDS,), ("context",), axis_types=(AxisType.Auto,))
PACKED = np.asarray(
    [
        [0] * 7 + [3] * 5 + [4] * 7 + [3] * 5,  # padding on the left, over shards; changes inside and at a border
        [2] * 4 + [0] * 4 + [2] * 4 + [1] + [0] * 11,  # a whole shard of padding inside a segment, more on the right
        [0] * 24,
        [0] * 22 + [5] * 2,
        [6] + [0] * 23,
    ]
)


def arguments(taps):
    rng = np.random.default_rng(0)
    shapes = ((5, TOKENS, CHANNELS), (taps, CHANNELS), (5, taps - 1, CHANNELS))
    x, weight, state = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return x, weight, state, (rng.normal(size=x.shape), rng.normal(size=state.shape))


def split(x, weight, segment_ids, state):
    tokens = P(None, "context")
    run = partial(context_short_convolution, axis_name="context")
    mapped = jax.shard_map(run, mesh=MESH, in_specs=(tokens, P(), tokens, P()), out_specs=(tokens, P()))
    return mapped(x, weight, segment_ids, state)


@partial(jax.jit, static_argnames="operator")
def results_and_gradients(x, weight, segment_ids, state, cotangents, operator):
    results, pull = jax.vjp(lambda x, weight, state: operator(x, weight, segment_ids, state), x, weight, state)
    return results, pull(jax.tree.map(lambda c, r: jnp.asarray(c, r.dtype), cotangents, results))


@pytest.mark.parametrize("taps", [2, 4])  # with one tap jaxlib 0.11.2 crashes on the empty state
@pytest.mark.parametrize("packed", [False, True])
def test_split_equals_whole(taps, packed):
    x, weight, state, cotangents = arguments(taps)
    segment_ids = jnp.asarray(PACKED, jnp.int32) if packed else None
    actual, expected = (
        results_and_gradients(x, weight, segment_ids, state, cotangents, operator)
        for operator in (split, short_convolution)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_initial_state_is_zeros():
    x, weight, _, _ = arguments(4)
    (y, final), (expected, expected_final) = split(x, weight, None, None), short_convolution(x, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(final, expected_final)


def test_wrong_arguments_are_refused():
    x, weight, _, _ = arguments(5)
    with pytest.raises(ValueError, match="x has T=3 tokens per shard"):
        split(x, weight, None, None)
    with pytest.raises(ValueError, match="axis_name='context' is no mesh axis"):
        context_short_convolution(x, weight, axis_name="context")
    with pytest.raises(ValueError, match="weight has shape"):
        split(x, weight[:, :2], None, None)
