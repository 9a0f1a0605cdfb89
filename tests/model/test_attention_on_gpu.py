"""The fused attention of GPU runs against the portable form, by `make test-gpu`: documents, padding, grouped heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model import attention

pytestmark = pytest.mark.gpu

SIZES = [(128, 4, 2, 64), (1000, 3, 1, 128), (257, 9, 3, 64), (11, 2, 1, 64)]  # odd lengths among them


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "heads", "groups", "width"), SIZES)
def test_fused_equals_portable(packed, length, heads, groups, width):
    """Values and each gradient: both are bfloat16, so each is compared with float32 arithmetic on the same inputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (2, length, heads, width), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, groups, width), jnp.bfloat16) for key in keys[2:])
    segments = None
    if packed:  # documents of several lengths, padding on either side and between
        ids = np.repeat([0, 1, 1, 2, 0, 3, 3, 3, 4, 0], -(-length // 10))[:length]
        segments = jnp.asarray(np.stack([ids, np.roll(ids, 17)]), jnp.int32)
        d_out = d_out * (segments != 0)[..., None, None]  # what padding gives is nobody's business

    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: attention.causal_attention(*x, segments), q, k, v)
        return out if segments is None else out * (segments != 0)[..., None, None], *pull(d_out.astype(out.dtype))

    fused = jax.jit(run)
    assert "cudnn" in fused.lower(q, k, v).as_text().lower()
    actual = fused(q, k, v)
    expected = jax.jit(run)(*(x.astype(jnp.float32) for x in (q, k, v)))  # 32 bits take the portable form
    for name, a, b in zip(("out", "q", "k", "v"), actual, expected):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        assert np.all(np.isfinite(a)), name
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max(), name
