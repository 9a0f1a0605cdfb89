"""A token of a softmax layer between its projections: the kernels interpreted against the formula, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels import Places
from jaxhybrid_kernels.gpu.attention_token import Blocks, attention_token, attention_token_refusal

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"))
G, R, K = 2, 3, 64
H = G * R
PLACES = Places(q=G, k=0, v=G + H)  # in no order of their own


def operands(B, M, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    angles = 7 * draw(B, K // 2)
    return (
        draw(B, (H + 2 * G) * K + 5),
        (jnp.cos(angles), jnp.sin(angles)),
        *(draw(B, G, M, K).astype(dtype) for _ in "kv"),
    )


def formula(projections, rotation, k, v, index, scale):
    """In float64: out [B,H*K], and the caches after it."""
    B, _, M, _ = k.shape
    heads = np.asarray(projections, np.float64)[:, : (H + 2 * G) * K].reshape(B, -1, K)
    cos, sin = (np.asarray(x, np.float64)[:, None] for x in rotation)

    def turned(x):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    q = turned(heads[:, PLACES.q : PLACES.q + H]).reshape(B, G, R, K)
    k, v = (np.array(x, np.float64) for x in (k, v))
    for row, at in enumerate(index):
        if at < M:
            k[row, :, at] = turned(heads[:, PLACES.k : PLACES.k + G])[row]
            v[row, :, at] = heads[row, PLACES.v : PLACES.v + G]
    scores = scale * np.einsum("bgrk,bgmk->bgrm", q, k)
    scores = np.where(np.arange(M) <= np.asarray(index)[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bgrm,bgmk->bgrk", weights / weights.sum(-1, keepdims=True), v)
    return out.reshape(B, -1), k, v


@pytest.mark.parametrize(
    "blocks",
    [
        Blocks(keys=16, warps=1, programs=2 * G * 8),  # parts of one block
        Blocks(keys=16, warps=1, programs=2 * G * 2),  # of several
        Blocks(keys=32, warps=4, programs=1),  # all at once
    ],
)
@pytest.mark.parametrize("index", [(0, 15), (16, 17), (63, 95), (127, 128)])
def test_equals_the_formula(blocks, index):
    """The first place, both sides of a border, the last, and one beyond the cache."""
    projections, rotation, k, v = operands(2, 128)
    results = attention_token(
        projections, PLACES, rotation, k, v, jnp.asarray(index, jnp.int32), heads=H, scale=0.2, dtype=jnp.float32,
        blocks=blocks,
    )  # fmt: skip
    for result, wanted in zip(results, formula(projections, rotation, k, v, index, 0.2)):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)


def test_what_lies_behind_the_token_does_not_matter():
    """Not even what is no number, in its own block or in other parts."""
    projections, rotation, k, v = operands(1, 64)
    index = jnp.asarray([20], jnp.int32)
    run = lambda *caches: attention_token(  # noqa: E731
        projections, PLACES, rotation, *caches, index, heads=H, scale=0.125, dtype=jnp.float32,
        blocks=Blocks(keys=16, warps=1, programs=8),
    )[0]  # fmt: skip
    np.testing.assert_array_equal(run(k, v), run(*(x.at[:, :, 20:].set(jnp.nan) for x in (k, v))))


def test_in_bfloat16_the_caches_are_rounded_once():
    projections, rotation, k, v = operands(1, 64, jnp.bfloat16)
    out, *caches = attention_token(
        projections, PLACES, rotation, k, v, jnp.asarray([40], jnp.int32), heads=H, scale=0.125, dtype=jnp.bfloat16
    )
    wanted, *after = formula(projections, rotation, k, v, [40], 0.125)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=0.03)
    for cache, exact in zip(caches, after):
        assert cache.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(cache, np.float64), exact, rtol=2.0**-8)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"k": (1, 2, 1024, 96)}, "6 queries of 96 channels"),
        ({"k": (1, 2, 1000, 128)}, "1 x 1000 keys; the kernels take multiples of 16"),
        ({"k": (1, 2, 8208, 128)}, "1 x 8208 keys; the kernels take multiples of 64"),
        ({"k": (64, 2, 1024, 128)}, "64 x 1024 keys"),
        ({"heads": 34}, "17 queries of 128 channels"),
        ({"rotation": (1, 32)}, "64 of 128 channels are rotated"),
        ({"dtype": jnp.float16}, "the cache has dtype float16"),
    ],
)
def test_refusals_name_the_value(changed, told):
    given = {"k": (1, 2, 1024, 128), "rotation": (1, 64), "heads": 12, "dtype": jnp.bfloat16} | changed
    tables = (jax.ShapeDtypeStruct(given["rotation"], jnp.float32),) * 2
    projections = jax.ShapeDtypeStruct((1, 2048), jnp.float32)
    cache = jax.ShapeDtypeStruct(given["k"], given["dtype"])
    reason = attention_token_refusal(projections, tables, cache, given["heads"])
    assert reason is None if told is None else told in reason


@pytest.mark.parametrize("programs", [64, 4])
def test_lowered_for_cuda_it_is_two_kernels_that_write_the_caches_in_place(programs):
    projections, rotation, k, v = operands(1, 256, jnp.bfloat16)
    run = jax.jit(
        lambda k, v, *given: attention_token(
            given[0], PLACES, given[1], k, v, given[2], heads=H, scale=0.125, dtype=jnp.bfloat16,
            blocks=Blocks(keys=32, warps=4, programs=programs),
        )
    )  # fmt: skip
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(H100):
        exported = export.export(run, platforms=["cuda"], disabled_checks=[check])
        text = exported(k, v, projections, rotation, jnp.zeros(1, jnp.int32)).mlir_module()
    assert text.count("xla.gpu.triton") == 2
    assert text.count("#stablehlo.output_operand_alias<") == 2
    assert "stablehlo.dot_general" not in text
