"""What the next kernels read, read on the side: results stay as they are, and the reads are in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.triton import lowering
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels import Places, linear_attention_token, row_product
from jaxhybrid_kernels.gpu import attention_token as attention
from jaxhybrid_kernels.gpu import layer_token, read_on
from jaxhybrid_kernels.gpu import row_product as product_kernel
from jaxhybrid_kernels.gpu.read_on import PIECE, pieces_of, programs

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"))
B, N, G, K = 2, 3, 2, 64
# Of each other number of pieces, the last array beyond every limit.
THEN = [jnp.ones(size, dtype) for size, dtype in (((3, 4096), jnp.bfloat16), ((5, 9000), jnp.float32))]


def draw(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


def products(**given):
    return (row_product(draw(1, 1, 64), draw(16, 64), **given),)


def linear(**given):
    gates = -jnp.abs(draw(B, N)), jax.nn.sigmoid(draw(B, N))
    return linear_attention_token(
        draw(B, 4 * N * K), Places(0, N, 2 * N, 3 * N), gates, draw(B, N, K, K), out_norm=(draw(K), 1e-5),
        dtype=jnp.float32, **given,
    )  # fmt: skip


def softmax(*, implementation, **given):
    del implementation
    caches, rotation = [draw(B, G, 32, K) for _ in "kv"], [draw(B, K // 2)] * 2
    return attention.attention_token(
        draw(B, (N * G + 2 * G) * K), Places(0, N * G, N * G + G), rotation, *caches, jnp.asarray([3, 20]),
        heads=N * G, scale=0.1, dtype=jnp.float32, **given,
    )  # fmt: skip


@pytest.mark.parametrize("operator", [products, linear, softmax])
def test_results_stay(operator, monkeypatch):
    """Interpreted, every element."""
    expected = operator(implementation="triton")
    taken = []
    monkeypatch.setattr(read_on, "gpu_capability", lambda: "9.0")
    for module in (attention, layer_token, product_kernel):
        monkeypatch.setattr(module, "pieces_of", lambda *given: taken.append(pieces_of(*given)) or taken[-1])
    results = operator(implementation="triton", then=THEN)
    assert sum(map(programs, taken)) >= 2
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize(
    ("limit", "warps", "counts"),
    [(0, 1, []), (PIECE - 1, 1, []), (2 * PIECE, 1, [2]), (100 * PIECE, 1, [3, 21]), (9 * PIECE, 2, [1, 3])],
)
def test_pieces_are_whole_and_in_order(limit, warps, counts):
    """24,576 and 180,000 bytes; what is left of an array after its last whole piece is not read."""
    with jax.sharding.use_abstract_mesh(H100):
        found = pieces_of(THEN, limit, warps)
    assert [each.number for each in found] == counts
    for each in found:
        assert each.number * each.elements <= each.array.size
        assert each.elements * each.array.dtype.itemsize == warps * PIECE


def test_small_caches_are_left_alone(monkeypatch):
    assert pieces_of(THEN, 100 * PIECE, 1) == []  # a CPU
    monkeypatch.setattr(read_on, "gpu_capability", lambda: "8.6")
    assert pieces_of(THEN, 100 * PIECE, 1) == []


@pytest.mark.parametrize("operator", [products, linear, softmax])
def test_compiled_the_reads_are_there(operator, monkeypatch):
    """As Triton gets them: marked, so that they stay though nothing is made of them."""
    modules = []
    lower = lowering.lower_jaxpr_to_triton_module

    def lowered(*given, **named):
        result = lower(*given, **named)
        modules.append(result.module.operation.get_asm())
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", lowered)
    monkeypatch.setattr(attention, "on_nvidia", lambda: True)
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(H100):
        for given in ({}, {"then": THEN}):
            run = jax.jit(lambda given=given: operator(implementation=None, **given))
            export.export(run, platforms=["cuda"], disabled_checks=[check])()
    without, reading = (sum(text.count("isVolatile = true") for text in half) for half in halves(modules))
    assert without == 0 < reading


def halves(both):
    return both[: len(both) // 2], both[len(both) // 2 :]
