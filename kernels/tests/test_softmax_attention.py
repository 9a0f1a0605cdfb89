"""Softmax attention's Hopper kernels: interpreted against the formula in float64, lowered for CUDA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jaxhybrid_kernels import numerics
from jaxhybrid_kernels.gpu import softmax_attention as module
from jaxhybrid_kernels.gpu.block_ranges import key_blocks_seen, query_blocks_seeing
from jaxhybrid_kernels.gpu.softmax_attention import make_plan, softmax_attention, softmax_attention_refusal
from jaxhybrid_kernels.numerics import attends_by_kernels, gpu_capability, on_nvidia

BOUND = {"bfloat16": 8e-3, "float16": 1e-3}  # of the greatest value
slow = pytest.mark.slow


def document_starts(rows, length, documents, seed=0):
    """int32 [rows,length]: where each token's document begins; their lengths are random, one of them is 1."""
    rng = np.random.default_rng(seed)
    begins = np.sort(rng.integers(1, length, (rows, documents - 1)), axis=1)
    begins[:, 1:2] = np.minimum(begins[:, :1] + 1, length - 1)
    begins = np.sort(begins, axis=1)
    places = [np.searchsorted(row, np.arange(length), side="right") for row in begins]
    return np.stack([np.concatenate([[0], row])[place] for row, place in zip(begins, places)]).astype(np.int32)


def visible(starts, first, keys):
    key, query = np.arange(keys), first + np.arange(starts.shape[1])
    return (key >= starts[..., None]) & (key <= query[:, None])


def formula(q, k, v, seen):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhk,bmhk->bhqm", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -np.inf), axis=-1)
    return jnp.einsum("bhqm,bmhk->bqhk", weights, v)


def check(sizes, starts, first=0, dtype="bfloat16"):
    """Values and each gradient, of queries from `first` on; sizes: queries, keys, query and key heads, width.

    Returns the gradients of keys and values.
    """
    Q, M, Hq, Hk, D = sizes
    rng, B = np.random.default_rng(1), len(starts)
    q, d_out = (jnp.asarray(rng.normal(size=(B, Q, Hq, D)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(B, M, Hk, D)), dtype) for _ in range(2))
    starts = jnp.asarray(starts[:, first : first + Q])
    plan = make_plan(q, k)

    def both(run, d_out, *operands):
        out, pull = jax.vjp(run, *operands)
        return out, *pull(d_out)

    @jax.jit
    def kernels(d_out, *operands):
        return both(lambda q, k, v: softmax_attention(q, k, v, starts, jnp.int32(first), plan), d_out, *operands)

    actual = kernels(d_out, q, k, v)
    with jax.enable_x64(True):
        seen = visible(np.asarray(starts), first, M)
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (d_out, q, k, v))
        expected = both(lambda q, k, v: formula(q, k, v, seen), *exact)
    for name, a, b in zip(("out", "q", "k", "v"), actual, expected):
        assert a.dtype == q.dtype, name
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.abs(a - b).max() <= BOUND[dtype] * np.abs(b).max(), name
    return actual[2:]


def test_documents_of_a_slice_of_the_queries():
    """Lengths that no block divides; blocks of keys before and after what the slice sees are nobody's."""
    starts = document_starts(1, 300, 3)
    starts[:, 140:] = np.maximum(starts[:, 140:], 140)
    gradients = check((50, 300, 2, 1, 64), starts, first=150)
    seeing = query_blocks_seeing(jnp.asarray(np.pad(starts[:, 150:200], ((0, 0), (0, 78)), "edge")), 150, 384, 64, 64)
    np.testing.assert_array_equal(np.asarray(seeing[0, :, 0] < seeing[0, :, 3]), [False] * 2 + [True] * 3 + [False])
    for gradient in gradients:
        nobodys = np.asarray(gradient, np.float32)
        assert not nobodys[:, :140].any()
        assert not nobodys[:, 200:].any()
        assert nobodys[:, 140:200].any()


@pytest.mark.parametrize(
    ("sizes", "documents", "dtype"),
    [
        ((256, 256, 2, 2, 128), 1, "bfloat16"),
        ((384, 384, 6, 1, 128), 2, "bfloat16"),
        ((130, 130, 6, 2, 64), 40, "float16"),
        ((320, 320, 2, 1, 128), 8, "float16"),
        ((320, 320, 3, 1, 64), 4, "bfloat16"),
    ],
)
@slow
def test_sizes(sizes, documents, dtype):
    """Warpgroups that hold neighbouring heads, and neighbouring queries where a group has an odd number of heads."""
    check(sizes, document_starts(2, sizes[1], documents), dtype=dtype)


@slow
def test_few_queries_at_the_end():
    """All of the second block of queries is padding, and beyond the last key."""
    check((3, 128, 2, 1, 64), document_starts(1, 128, 3), first=125)


@slow
def test_no_document_and_a_window():
    """Starts that rise with every query, as a sliding window's do."""
    check((256, 256, 1, 1, 64), np.maximum(np.arange(256) - 70, 0)[None].astype(np.int32))


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize(("first", "documents"), [(0, 1), (0, 9), (130, 9), (256, 30)])
def test_ranges_of_blocks(first, documents, queries, keys):
    """Exactly the blocks in which something is seen, and of them the ones where all is."""
    tokens, length = 512, 256
    starts = document_starts(3, tokens, documents)[:, first : first + length]
    seen = visible(starts, first, tokens).reshape(3, length // queries, queries, tokens // keys, keys)
    some, all_ = seen.any(axis=(2, 4)), seen.all(axis=(2, 4))
    arguments = jnp.asarray(starts), jnp.int32(first), tokens, queries, keys
    for ranges, axis in ((key_blocks_seen(*arguments), 1), (query_blocks_seeing(*arguments), 2)):
        begin, full_begin, full_end, end, place = np.moveaxis(np.asarray(ranges), 2, 0)[..., None]
        block = np.arange(tokens // keys if axis == 1 else length // queries)
        expected = some, all_
        if axis == 2:
            expected = [np.swapaxes(x, 1, 2) for x in expected]
        np.testing.assert_array_equal((block >= begin) & (block < end), expected[0])
        np.testing.assert_array_equal((block >= full_begin) & (block < full_end), expected[1])
        assert (place[..., 0] == first + (queries * np.arange(length // queries) if axis == 1 else 0)).all()


def test_lowers_for_cuda_inside_shard_map_under_checkpoint(monkeypatch):
    """With manual axes checked, which the interpreter cannot do."""
    monkeypatch.setattr(module, "target_platform", lambda: "gpu")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.P("data")

    def local(q, k, v, starts):
        first = jax.lax.pcast(jnp.int32(64), ("data",), to="varying")
        return jax.checkpoint(softmax_attention, static_argnums=5)(q, k, v, starts, first, make_plan(q, k))

    def loss(q, k, v, starts):
        out = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 4, out_specs=split)(q, k, v, starts)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, split))

    k = array(2, 300, 1, 128)
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        arguments = array(2, 200, 2, 128), k, k, array(2, 200, dtype=jnp.int32)
        export.export(gradient, platforms=["cuda"], disabled_checks=unchecked)(*arguments)


@pytest.mark.parametrize(
    ("shapes", "dtype", "told"),
    [
        (((1, 9, 6, 128), (1, 9, 2, 128)), jnp.bfloat16, None),
        (((1, 9, 6, 64), (1, 9, 6, 64)), jnp.float16, None),
        (((1, 9, 6, 128), (1, 9, 2, 128)), jnp.float32, "dtypes float32 and float32"),
        (((1, 9, 6, 256), (1, 9, 2, 256)), jnp.bfloat16, "256 channels"),
        (((1, 9, 6, 64), (1, 9, 4, 64)), jnp.bfloat16, "4 key heads do not divide 6 query heads"),
    ],
)
def test_refusals_name_the_value(shapes, dtype, told):
    reason = softmax_attention_refusal(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    assert reason is None if told is None else told in reason


@pytest.mark.parametrize(
    ("capability", "told"), [("9.0", None), ("8.0", "this GPU has 8.0"), ("10.0", "has 10.0"), ("", "an unknown one")]
)
def test_refuses_other_gpus(monkeypatch, capability, told):
    monkeypatch.setattr(numerics, "target_platform", lambda: "gpu")
    monkeypatch.setattr(numerics, "gpu_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, 9, 2, 64), jnp.bfloat16)
    reason = softmax_attention_refusal(q, q)
    assert reason is None if told is None else told in reason


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA H200", "9.0"),
        ("NVIDIA GH200 480GB", "9.0"),
        ("NVIDIA A100-SXM4-80GB", ""),
        ("NVIDIA GB200", ""),
        ("NVIDIA B200", ""),
    ],
)
def test_capability_of_a_gpu_that_is_not_here(kind, capability):
    described = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described)):
        assert gpu_capability() == capability


@pytest.mark.parametrize(("kind", "capability", "has_triton"), [("L4", "8.9", True), ("V100-SXM2", "7.0", False)])
def test_capability_of_a_gpu_that_is_here(monkeypatch, kind, capability, has_triton):
    device = type("Device", (), {"compute_capability": capability, "device_kind": f"NVIDIA {kind}"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert gpu_capability() == capability
    assert on_nvidia() == has_triton


@pytest.mark.parametrize(("wanted", "taken"), [("0", False), ("1", True), (None, True)])
def test_switch(monkeypatch, wanted, taken):
    monkeypatch.delenv("JAXHYBRID_ATTENTION_KERNELS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("JAXHYBRID_ATTENTION_KERNELS", wanted)
    assert attends_by_kernels() == taken
