"""Queries of a shared row, spread so that all devices do the same: results as before, and who computes which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.balanced import balanced
from jaxhybrid.model.partition import axis_index, joined, make_mesh, on_shards
from jaxhybrid.model.softmax import causal_attention

T = 48


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_values_and_gradients_of_a_shared_row(devices):
    shapes = (2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8), (2, T, 4, 8)
    q, k, v, d_out = (jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate(shapes))
    ids = jnp.sort(jax.random.randint(jax.random.key(9), (2, T), 1, 4), axis=1)
    tokens = jax.P(None, "context")

    def local(q, k, v, ids):
        k, v, ids = (joined(x, 1, "context") for x in (k, v, ids))
        return balanced(q, lambda q, first: causal_attention(q, k, v, None, key_segment_ids=ids, first_query=first))

    def together(q, k, v):
        return on_shards(local, (q, k, v, ids), (tokens,) * 4, tokens)

    def pulled(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(jax.device_put(d_out, jax.typeof(out).sharding) if attend is together else d_out)

    expected = pulled(lambda q, k, v: causal_attention(q, k, v, ids))
    with jax.set_mesh(make_mesh(1, 1, 1, devices, devices=jax.devices()[:devices])):
        found = jax.jit(lambda: pulled(together))()
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_every_device_has_the_same_work(devices):
    tokens = jax.P(None, "context")

    def local(q):
        return balanced(q, lambda q, first: q[..., 0] + axis_index("context"))

    with jax.set_mesh(make_mesh(1, 1, 1, devices, devices=jax.devices()[:devices])):
        q = jnp.zeros((1, T, 1, 1), jnp.int32)
        computed_by = np.asarray(jax.jit(lambda: on_shards(local, (q,), (tokens,), tokens))())[0, :, 0]
    keys = np.arange(T) + 1  # that each query sees
    assert [keys[computed_by == device].sum() for device in range(devices)] == [keys.sum() / devices] * devices
