"""The attention of GPU runs against plain JAX, by `make test-gpu`: documents, padding, grouped heads, slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.softmax import Window, causal_attention

pytestmark = pytest.mark.gpu

SIZES = [(128, 4, 2, 64), (1000, 3, 1, 128), (257, 9, 3, 64), (11, 2, 1, 64), (2600, 4, 1, 64)]  # odd ones among them


def documents(kind, length):
    if kind == "none":
        return None
    if kind == "one":
        return jnp.ones((2, length), jnp.int32)
    if kind == "short":
        return jnp.asarray(np.stack([np.arange(length) // 3, np.arange(length) // 7]) + 1, jnp.int32)
    ids = np.repeat([0, 1, 1, 2, 0, 3, 3, 3, 4, 0], -(-length // 10))[:length]  # padding at both ends and between
    return jnp.asarray(np.stack([ids, ids[::-1]]), jnp.int32)


@pytest.fixture(params=["cudnn", "kernels"], autouse=True)
def form(request, monkeypatch):
    """With the package's own kernels and without."""
    monkeypatch.setenv("JAXHYBRID_ATTENTION_KERNELS", "1" if request.param == "kernels" else "0")
    return request.param


def compare(run, q, k, v, d_out, real, by="cudnn"):
    """Values and each gradient: both are bfloat16, so each is compared with float32 arithmetic on the same inputs."""

    def both(q, k, v):
        out, pull = jax.vjp(run, q, k, v)
        return out * real, *pull((d_out * real).astype(out.dtype))  # what padding gives is nobody's business

    fused = jax.jit(both)
    text = fused.lower(q, k, v).as_text().lower()
    assert [name in text for name in ("cudnn", "mosaic_gpu")] == [by == "cudnn", by == "kernels"]
    actual = fused(q, k, v)
    expected = jax.jit(both)(*(x.astype(jnp.float32) for x in (q, k, v)))  # 32 bits take the plain form
    for name, a, b in zip(("out", "q", "k", "v"), actual, expected):
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
        assert np.all(np.isfinite(a)), name
        assert np.abs(a - b).max() <= 0.02 * np.abs(b).max(), name  # both are 0 where all is padding


def inputs(length, heads, groups, width):
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (2, length, heads, width), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, groups, width), jnp.bfloat16) for key in keys[2:])
    return q, k, v, d_out


@pytest.mark.parametrize("kind", ["none", "one", "short", "padded"])
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_equals_plain(kind, sizes, form):
    q, k, v, d_out = inputs(*sizes)
    ids = documents(kind, sizes[0])
    real = jnp.ones((1, 1, 1, 1)) if ids is None else (ids != 0)[..., None, None]
    by = "cudnn" if kind == "none" else form  # nothing to skip
    compare(lambda q, k, v: causal_attention(q, k, v, ids), q, k, v, d_out, real, by)


@pytest.mark.parametrize("kind", ["none", "padded"])
def test_capped_scores(kind):
    q, k, v, d_out = inputs(2600, 8, 4, 256)
    ids = documents(kind, 2600)
    real = jnp.ones((1, 1, 1, 1)) if ids is None else (ids != 0)[..., None, None]
    compare(lambda q, k, v: causal_attention(q, k, v, ids, cap=2.0), q, k, v, d_out, real, by="plain")


@pytest.mark.parametrize(
    ("first", "queries", "heads", "groups", "width"),
    [(1300, 1300, 4, 1, 64), (1300, 777, 4, 1, 64), (1300, 777, 3, 1, 128), (2590, 10, 6, 3, 128)],
)
@pytest.mark.parametrize("kind", ["none", "short", "padded"])
def test_slices_of_the_queries(kind, first, queries, heads, groups, width, form):
    """With short documents many blocks of keys are seen by nobody; so are those after a slice that ends before them."""
    q, k, v, d_out = inputs(2600, heads, groups, width)
    ids, part = documents(kind, 2600), slice(first, first + queries)
    real = jnp.ones((1, 1, 1, 1)) if ids is None else (ids != 0)[:, part, None, None]

    def run(q, k, v):
        return causal_attention(q, k, v, None, key_segment_ids=ids, first_query=jnp.int32(first))

    compare(run, q[:, part], k, v, d_out[:, part], real, form)


@pytest.mark.parametrize("kind", ["none", "padded"])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("length", [1000, 2600])
def test_sliding_windows_and_sinks(kind, sinks, length, form):
    q, k, v, d_out = inputs(length, 4, 2, 64)
    ids = documents(kind, length)
    real = jnp.ones((1, 1, 1, 1)) if ids is None else (ids != 0)[..., None, None]
    window = Window(96, True, sinks)
    by = "cudnn" if sinks else form
    compare(lambda q, k, v: causal_attention(q, k, v, ids, window=window), q, k, v, d_out, real, by)
