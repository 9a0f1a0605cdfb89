"""How far attention looks back: the blocked form against plain arrays of tokens by tokens, and known cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.layers import segment_starts
from jaxhybrid.model.reach import attention_distance
from jaxhybrid.model.softmax import Window


def plain(q, k, v, ids, first=0, window=None):
    """[B,Q,H] in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    starts = np.asarray(segment_starts(ids))[:, first : first + q.shape[1]]
    key, query = np.arange(k.shape[1]), first + np.arange(q.shape[1])
    seen = (key <= query[:, None]) & (key >= starts[..., None])
    if window is not None:
        seen &= key > query[:, None] - window
    weights = np.exp(np.einsum("bqhk,bmhk->bqhm", q, k) / np.sqrt(q.shape[-1])) * seen[:, :, None]
    weights /= weights.sum(-1, keepdims=True)
    read = weights * np.linalg.norm(v, axis=-1).transpose(0, 2, 1)[:, None]
    back = query[:, None] - key
    return np.einsum("bqhm,qm->bqh", read, back) / read.sum(-1)


def inputs(queries=21, keys=21):
    ids = np.ones((2, keys), np.int32)
    ids[0, 9:], ids[0, -3:], ids[1, :4] = 2, 0, 0
    shapes = (2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes))
    return q, k, v, jnp.asarray(ids)


@pytest.mark.parametrize(("block", "window"), [(4, None), (64, 5)])
def test_equals_arrays_of_tokens_by_tokens(block, window):
    q, k, v, ids = inputs()
    given = None if window is None else Window(window, True)
    found = attention_distance(q, k, v, ids, window=given, block=block)
    np.testing.assert_allclose(found, plain(q, k, v, ids, window=window), atol=2e-5)


def test_queries_that_are_a_part_of_the_row():
    q, k, v, ids = inputs(queries=8)
    found = attention_distance(q, k, v, ids[:, 11:19], key_segment_ids=ids, first_query=jnp.int32(11), block=3)
    np.testing.assert_allclose(found, plain(q, k, v, ids, first=11), atol=2e-5)


def test_even_attention_reaches_half_of_the_document_and_a_sink_without_value_does_not_count():
    q, k, v, ids = jnp.zeros((1, 10, 2, 4)), jnp.ones((1, 10, 1, 4)), jnp.ones((1, 10, 1, 4)), jnp.ones((1, 10), int)
    ids = ids.at[0, 6:].set(2)
    found = attention_distance(q, k, v, ids)
    place = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    np.testing.assert_allclose(found[0, :, 0], place / 2, atol=1e-6)
    silent = attention_distance(q, k, v.at[:, 0].set(0), ids)
    np.testing.assert_allclose(silent[0, :6, 0], [0, 0, 0.5, 1, 1.5, 2], atol=1e-6)
