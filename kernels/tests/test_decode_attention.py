"""Attention of one query to a long cache: the kernel interpreted against the formula, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels.gpu.decode_attention import (
    ELSEWHERE,
    ON_HOPPER,
    decode_attention_kernel,
    decode_attention_refusal,
)


@pytest.mark.parametrize(
    ("B", "G", "R", "M", "blocks"),
    [(3, 1, 3, 384, ON_HOPPER), (3, 1, 3, 384, ELSEWHERE), (1, 2, 6, 256, ON_HOPPER), (2, 2, 16, 64, ELSEWHERE)],
)
def test_equals_the_formula(B, G, R, M, blocks):
    """Caches of one and more parts, of which rows see the first keys, all, or the first only."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, G, length, 64)) for length in (R, M, M))
    last = np.array([M * 5 // 9, M - 1, 0])[:B].astype(np.int32)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out = decode_attention_kernel(*arrays, jnp.asarray(last), blocks=blocks, interpret=True)
    scores = np.where(np.arange(M) <= last[:, None, None, None], q @ np.moveaxis(k, 2, 3) / 8, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(out, weights @ v / weights.sum(-1, keepdims=True), rtol=1e-5, atol=1e-5)


def test_what_lies_behind_the_last_key_does_not_matter():
    q, k = jnp.ones((1, 1, 2, 64)), jnp.ones((1, 1, 256, 64))
    v = k.at[:, :, 100:].set(1e30)
    out = decode_attention_kernel(q, k, v, jnp.asarray([99], jnp.int32), interpret=True)
    np.testing.assert_allclose(out, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "dtype", "told"),
    [
        (((64, 2, 6, 128), (64, 2, 4096, 128)), jnp.bfloat16, None),
        (((64, 2, 6, 128), (64, 2, 4096, 128)), jnp.float32, "dtypes float32 and float32"),
        (((64, 2, 6, 96), (64, 2, 4096, 96)), jnp.bfloat16, "6 queries of 96 channels"),
        (((64, 1, 17, 128), (64, 1, 4096, 128)), jnp.bfloat16, "17 queries of 128 channels"),
        (((1, 2, 6, 128), (1, 2, 1024, 128)), jnp.bfloat16, "1 x 1024 keys"),
        (((1, 2, 6, 128), (1, 2, 65536, 128)), jnp.bfloat16, "of one row more than 65536"),
        (((1, 2, 6, 128), (1, 2, 98304, 128)), jnp.bfloat16, None),
    ],
)
def test_refusals_name_the_value(shapes, dtype, told):
    reason = decode_attention_refusal(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    assert reason is None if told is None else told in reason
