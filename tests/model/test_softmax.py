"""Softmax attention in each of its forms against the formula in float64: values and each gradient."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels.gpu.softmax_attention import KEPT

from jaxhybrid.model import softmax
from jaxhybrid.model.layers import segment_starts
from jaxhybrid.model.walk import POLICIES
from tests.tpu import needs_libtpu, printed_with_compiler

BOUNDS = {"float32": 2e-6, "bfloat16": 1.5e-2}  # of the greatest value


def documents(kind, length):
    """int32 [2,length]: none, packed, or packed with padding in front and at the end."""
    if kind == "none":
        return None
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 7, (2, length)), axis=1)
    ids[1] = np.arange(length) // 3 + 1
    if kind == "padded":
        ids[:, : length // 9], ids[0, -length // 7 :] = 0, 0
    return jnp.asarray(ids, jnp.int32)


def inputs(length, heads, groups, width, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (2, length, heads, width), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, groups, width), dtype) for key in keys[2:])
    return q, k, v, d_out


def formula(q, k, v, ids, first=0, window=None, sinks=0, cap=None):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    key = np.arange(k.shape[1])
    query = first + np.arange(q.shape[1])
    visible = (key <= query[:, None])[None]
    if window is not None:
        begins = key[None] == 0 if ids is None else np.diff(np.asarray(ids), prepend=-1) != 0
        starts = np.maximum.accumulate(np.where(begins, key, 0), axis=1)
        visible = visible & ((key > query[:, None] - window) | (key < starts[:, query, None] + sinks))
    if ids is not None:
        ids = np.asarray(ids)
        visible = visible & (ids[:, query][:, :, None] == ids[:, None, :])
    scores = jnp.einsum("bqhk,bmhk->bhqm", q, k) / np.sqrt(q.shape[-1])
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -np.inf), axis=-1)
    return jnp.einsum("bhqm,bmhk->bqhk", weights, v)


def check(run, q, k, v, d_out, ids, first=0, window=None, sinks=0, cap=None):
    """`run` on the queries from `first` on; what it gives at padding is nobody's business."""
    q, d_out = q[:, first:], d_out[:, first:]
    real = np.ones((1, 1, 1, 1)) if ids is None else np.asarray(ids != 0)[:, first:, None, None]

    def both(run, q, k, v, d_out):
        out, pull = jax.vjp(run, q, k, v)
        return jnp.where(real, out, 0), *pull(jnp.where(real, d_out, 0))

    actual = jax.jit(partial(both, run))(q, k, v, d_out)
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, d_out))
        expected = jax.jit(partial(both, lambda q, k, v: formula(q, k, v, ids, first, window, sinks, cap)))(*exact)
    for name, a, b in zip(("out", "q", "k", "v"), actual, expected):
        assert a.dtype == q.dtype, name
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.abs(a - b).max() <= BOUNDS[q.dtype.name] * np.abs(b).max(), name


def on_gpu(monkeypatch, row=0, middle=0):
    """The GPU's form in small blocks, with XLA where cuDNN would be."""
    sizes = {"GPU_ROW": row, "GPU_MIDDLE_ROW": middle, "GPU_QUERY_BLOCK": 16, "GPU_QUERIES": 64}
    for name, value in (sizes | {"CUDNN": "xla"}).items():
        monkeypatch.setattr(softmax, name, value)
    monkeypatch.setattr(softmax, "target_platform", lambda: "gpu")
    monkeypatch.setenv("JAXHYBRID_ATTENTION_KERNELS", "0")


def splash(q, k, v, ids, first=0, window=None, cap=None):
    starts = jnp.zeros(k.shape[:2], jnp.int32) if ids is None else segment_starts(ids)
    first = jnp.int32(first)
    query_starts = jax.lax.dynamic_slice_in_dim(starts, first, q.shape[1], 1)
    return softmax.splash_attention(q, k, v, query_starts, starts, first, window, cap, block=128, interpret=True)


def sliced(q, k, v, ids, first, window=None, cap=None):
    return softmax.causal_attention(
        q, k, v, None, key_segment_ids=ids, first_query=jnp.int32(first), window=window, cap=cap
    )


@pytest.mark.parametrize(("heads", "groups", "kind"), [(2, 2, "none"), (3, 1, "packed"), (8, 2, "padded")])
@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_form(monkeypatch, dtype, block, heads, groups, kind):
    monkeypatch.setattr(softmax, "QUERY_BLOCK", block)
    ids = documents(kind, 101)
    check(lambda q, k, v: softmax.causal_attention(q, k, v, ids), *inputs(101, heads, groups, 8, dtype), ids)


@pytest.mark.parametrize(
    ("kind", "row", "middle"),
    [("packed", 0, 0), ("padded", 0, 0), ("one", 0, 0), ("padded", 2048, 0), ("none", 0, 0), ("packed", 0, 2048)],
)
def test_form_of_gpus(monkeypatch, kind, row, middle):
    on_gpu(monkeypatch, row, middle)
    ids = jnp.ones((2, 101), jnp.int32) if kind == "one" else documents(kind, 101)
    check(lambda q, k, v: softmax.causal_attention(q, k, v, ids), *inputs(101, 6, 2, 8, "bfloat16"), ids)


@pytest.mark.parametrize(("policy", "names"), [("mlp", KEPT), ("block", ())])
def test_what_is_kept_of_splash_attention(capsys, policy, names):
    q, k, v, _ = inputs(128, 2, 1, 64, "bfloat16")
    run = jax.checkpoint(lambda *qkv: jnp.sum(splash(*qkv, None)), policy=POLICIES[policy])
    jax.ad_checkpoint.print_saved_residuals(run, q, k, v)
    assert sorted(re.findall(r"named '(\w+)'", capsys.readouterr().out)) == sorted(names)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "width", "kind", "dtype"),
    [
        (300, 1, 1, 64, "packed", "float32"),
        (256, 3, 1, 128, "none", "float32"),
        (300, 4, 1, 64, "padded", "bfloat16"),
    ],
)
def test_splash_attention(length, heads, groups, width, kind, dtype):
    ids = documents(kind, length)
    check(lambda q, k, v: splash(q, k, v, ids), *inputs(length, heads, groups, width, dtype), ids)


def on_hopper(monkeypatch, wanted=None):
    """As on a GPU with the package's own kernels, interpreted; a list that grows with each use of them.

    wanted: the variable of the environment that turns them off, unset if None.
    """
    on_gpu(monkeypatch)
    used = []

    def recorded(*arguments):
        used.append(arguments)
        return softmax_attention(*arguments)

    softmax_attention = softmax.softmax_attention
    monkeypatch.delenv("JAXHYBRID_ATTENTION_KERNELS")
    if wanted is not None:
        monkeypatch.setenv("JAXHYBRID_ATTENTION_KERNELS", wanted)
    monkeypatch.setattr(softmax, "softmax_attention", recorded)
    return used


@pytest.mark.parametrize(
    ("kind", "first", "window"),
    [
        ("padded", 37, 20),
        pytest.param("packed", 0, None, marks=pytest.mark.slow),
        pytest.param("none", 37, None, marks=pytest.mark.slow),
    ],
)
def test_kernels_of_hopper(monkeypatch, kind, first, window):
    used, ids = on_hopper(monkeypatch), documents(kind, 101)
    slides = None if window is None else softmax.Window(window, jnp.asarray(True))

    def run(q, k, v):
        if first == 0:
            return softmax.causal_attention(q, k, v, ids, window=slides)
        return sliced(q, k, v, ids, first, slides)

    check(run, *inputs(101, 2, 1, 64, "bfloat16"), ids, first, window)
    assert used


@pytest.mark.parametrize(
    ("width", "dtype", "more"),
    [
        (64, "bfloat16", {"window": softmax.Window(6, True, sinks=3)}),
        (64, "bfloat16", {"cap": 1.5}),
        (64, "float32", {}),
        (8, "bfloat16", {}),
    ],
)
def test_what_the_kernels_of_hopper_do_not_take(monkeypatch, width, dtype, more):
    used, ids = on_hopper(monkeypatch), documents("packed", 101)
    q, k, v, _ = inputs(101, 2, 1, width, dtype)
    out = jax.eval_shape(lambda q, k, v: softmax.causal_attention(q, k, v, ids, **more), q, k, v)
    assert out.shape == q.shape
    assert not used


@pytest.mark.parametrize(
    ("kind", "first", "window", "wanted", "taken"),
    [
        ("packed", 0, None, None, True),
        ("packed", 0, 20, None, True),
        ("none", 0, 20, None, True),
        ("none", 37, None, None, True),  # a chunk that sees a cache
        ("packed", 37, None, None, True),
        ("packed", 0, None, "0", False),
        ("none", 0, None, None, False),  # nothing to skip
    ],
)
def test_where_the_kernels_of_hopper_serve(monkeypatch, kind, first, window, wanted, taken):
    used, ids = on_hopper(monkeypatch, wanted), documents(kind, 101)
    slides = None if window is None else softmax.Window(window, jnp.asarray(True))
    q, k, v, _ = inputs(101, 2, 1, 64, "bfloat16")

    def run(q, k, v):
        if first == 0:
            return softmax.causal_attention(q, k, v, ids, window=slides)
        return sliced(q[:, first:], k, v, ids, first, slides)

    jax.eval_shape(run, q, k, v)
    assert bool(used) == taken


@pytest.mark.parametrize("kind", ["none", "padded"])
@pytest.mark.parametrize("form", ["plain", "blocks", "gpu", "short gpu", "splash"])
def test_slices_of_the_queries(monkeypatch, form, kind):
    """The last queries of a row, to all of its keys."""
    length, first = (300, 130) if form == "splash" else (101, 37)
    ids = documents(kind, length)
    dtype = "bfloat16" if "gpu" in form else "float32"
    if form == "blocks":
        monkeypatch.setattr(softmax, "QUERY_BLOCK", 16)
    if "gpu" in form:
        on_gpu(monkeypatch, row=2048 if form == "short gpu" else 0)
    run = splash if form == "splash" else sliced
    check(lambda q, k, v: run(q, k, v, ids, first), *inputs(length, 2, 1, 64, dtype), ids, first)


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.slow), 37])
@pytest.mark.parametrize("form", ["plain", "blocks", "gpu", "short gpu", "splash"])
def test_sliding_windows(monkeypatch, form, first):
    """The last keys of a document only, of all queries and of a slice, where the layer slides and where it does not."""
    length, size = (300, 70) if form == "splash" else (101, 20)
    ids = documents("padded", length)
    if form == "blocks":
        monkeypatch.setattr(softmax, "QUERY_BLOCK", 16)
    if "gpu" in form:
        on_gpu(monkeypatch, row=2048 if form == "short gpu" else 0)
    arrays = inputs(length, 2, 1, 64, "bfloat16" if "gpu" in form else "float32")
    attend = splash if form == "splash" else sliced
    for slides in (True, False):

        def run(q, k, v, slides=slides):  # traced, as a layer of a scan has it
            window = softmax.Window(size, jnp.asarray(slides))
            if first == 0 and form != "splash":
                return softmax.causal_attention(q, k, v, ids, window=window)
            return attend(q, k, v, ids, first, window)

        check(run, *arrays, ids, first, size if slides else None)


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.slow), 37])
@pytest.mark.parametrize("form", ["plain", "blocks", "gpu", "short gpu", "tpu"])
def test_sinks(monkeypatch, form, first):
    """The first tokens of a document beside its last ones: in a block's window and outside, of several documents."""
    ids = np.ones((2, 101), np.int32)
    ids[0, :5], ids[0, 75:], ids[1, 50:], ids[1, 53:], ids[1, 97:] = 0, 2, 2, 3, 0
    if form in ("blocks", "tpu"):
        monkeypatch.setattr(softmax, "QUERY_BLOCK", 16)
    if form == "tpu":
        monkeypatch.setattr(softmax, "target_platform", lambda: "tpu")
    if "gpu" in form:
        on_gpu(monkeypatch, row=2048 if form == "short gpu" else 0)
    arrays = inputs(101, 2, 1, 64, "float32" if form in ("plain", "blocks") else "bfloat16")
    window = softmax.Window(6, True, sinks=3)

    def run(q, k, v):
        if first == 0:
            return softmax.causal_attention(q, k, v, jnp.asarray(ids), window=window)
        return sliced(q, k, v, jnp.asarray(ids), first, window)

    check(run, *arrays, ids, first, 6, 3)


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "padded"])
@pytest.mark.parametrize(
    "form", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("plain", "blocks")), "gpu", "splash"]
)
def test_capped_scores(monkeypatch, form, kind):
    """A cap of the size of scores, with windows too, in each form; on GPUs not what stands for cuDNN."""
    length, dtype = (300, "float32") if form == "splash" else (161, "bfloat16" if form == "gpu" else "float32")
    if form == "blocks":
        monkeypatch.setattr(softmax, "QUERY_BLOCK", 16)
    if form == "gpu":
        on_gpu(monkeypatch, row=2048)
        monkeypatch.setattr(softmax, "CAPPED_SCORES", 1)
    ids, arrays = documents(kind, length), inputs(length, 2, 1, 64, dtype)
    attend = splash if form == "splash" else sliced
    check(lambda q, k, v: attend(q, k, v, ids, 0, cap=1.5), *arrays, ids, cap=1.5)
    window = softmax.Window(40, jnp.asarray(True))
    check(lambda q, k, v: attend(q, k, v, ids, 37, window, 1.5), *arrays, ids, 37, 40, cap=1.5)


def test_blocks_of_capped_scores_on_gpus():
    """By how many scores fit: rows x heads x keys of a query."""
    assert [softmax._capped_block(size) for size in (2**14, 8 * 8 * 4096, 8 * 32768, 2**22)] == [1024, 256, 256, 64]


def test_a_window_without_documents(monkeypatch):
    on_gpu(monkeypatch, row=2048)
    window = softmax.Window(20, True)
    check(
        lambda q, k, v: softmax.causal_attention(q, k, v, None, window=window),
        *inputs(101, 2, 1, 8, "bfloat16"), None, 0, 20,
    )  # fmt: skip


def test_decoding_in_a_window_and_capped():
    q, k, v, _ = inputs(101, 4, 2, 8, "float32")
    at = jnp.array([5, 60])
    rows = jnp.arange(2)
    caches = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    out = softmax.decode_attention(q[rows, at], *caches, at, softmax.Window(20, True))
    np.testing.assert_allclose(out, formula(q, k, v, None, window=20)[rows, at], atol=2e-5)
    caches = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    out = softmax.decode_attention(q[rows, at], *caches, at, cap=1.5)
    np.testing.assert_allclose(out, formula(q, k, v, None, cap=1.5)[rows, at], atol=2e-5)


def test_slices_together_are_the_whole(monkeypatch):
    """By devices that hold a part of the queries each, which checks what varies along the mesh, too."""
    monkeypatch.setattr(softmax, "QUERY_BLOCK", 8)
    q, k, v, _ = inputs(64, 2, 1, 8, "float32")
    ids = documents("packed", 64)
    whole = softmax.causal_attention(q, k, v, ids)
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    split, rows = jax.P("data", "context"), jax.P("data")

    def local(q, k, v, ids):
        return sliced(q, k, v, ids, jax.lax.axis_index("context") * q.shape[1])

    with jax.set_mesh(mesh):
        run = jax.shard_map(local, in_specs=(split, rows, rows, rows), out_specs=split)
        arrays = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v, ids), (split, *(rows,) * 3))]
        parts = jax.jit(run)(*arrays)
        gradients = jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x, arrays[3]))), (0, 1, 2)))(*arrays[:3])
    expected = jax.grad(lambda *x: jnp.sum(jnp.sin(softmax.causal_attention(*x, ids))), (0, 1, 2))(q, k, v)
    for a, b in zip((parts, *gradients), (whole, *expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("window", "cap"), [(None, None), (softmax.Window(20, True, sinks=4), None), (None, 1.5)])
def test_no_array_of_tokens_by_tokens(monkeypatch, window, cap):
    on_gpu(monkeypatch)
    monkeypatch.setattr(softmax, "CAPPED_SCORES", 2**14)
    q, k, v, d_out = inputs(520, 2, 1, 8, "bfloat16")
    ids = documents("packed", 520)

    def attend(q, k, v):
        return softmax.causal_attention(q, k, v, None, key_segment_ids=ids, window=window, cap=cap)

    def both(q, k, v):
        return jax.vjp(attend, q, k, v)[1](d_out)

    monkeypatch.setattr(softmax, "_cudnn_causal", lambda q, k, v: q)  # whose stand-in makes one
    text = jax.jit(both).lower(q, k, v).as_text()
    sizes = {part for shape in text.split("tensor<")[1:] for part in [tuple(shape.split(">")[0].split("x")[:-1])]}
    large = [size for size in sizes if sum(int(n) >= 512 for n in size) > 1]
    assert not large, large


def test_blocks_that_see_nothing_of_each_other_are_skipped():
    starts = segment_starts(jnp.asarray([[1] * 5 + [2] * 7 + [3] * 4]))
    pairs = softmax._seeing_blocks(starts, jnp.int32(0), 4, 4, 4)
    np.testing.assert_array_equal(pairs[0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(softmax._nearest(pairs, 2)[0, 0], [[0] * 4, [0, 1, 1, 1], [1, 1, 2, 2], [3] * 4])
    np.testing.assert_array_equal(
        softmax._nearest(pairs, 1)[0, 0], [[0, 1, 2, 3], [1, 1, 2, 3], [1, 2, 2, 3], [1, 2, 2, 3]]
    )


@needs_libtpu
def test_splash_attention_compiles_for_tpus():
    kernels = [f"splash_mha_{name}" for name in ("dkv_segmented", "dq_segmented", "fwd_segmented")]
    assert printed_with_compiler(__file__) == {"v5p:2x2x1": kernels, "v6e:2x2": kernels}


def compile_for_tpus():
    """Prints the kernels in the gradients of a context-parallel layer for v5p, and of odd lengths, capped, for v6e."""
    import re

    from jax.experimental import topologies

    def compiled(mesh, context, length, heads, groups, width, cap=None):
        queries = jax.P("data", "context") if context else jax.P(("data", "context"))
        rows = jax.P("data") if context else queries

        def local(q, k, v, ids):
            if not context:
                return softmax.causal_attention(q, k, v, ids, cap=cap)
            return sliced(q, k, v, ids, jax.lax.axis_index("context") * q.shape[1])

        def array(spec, *shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

        run = jax.shard_map(local, in_specs=(queries, rows, rows, rows), out_specs=queries)
        q = array(queries, 4, length, heads, width)
        k = array(rows, 4, length, groups, width)
        ids = array(rows, 4, length, dtype=jnp.int32)
        total = jax.grad(lambda q, k, v, ids: jnp.sum(jax.checkpoint(run)(q, k, v, ids), dtype=jnp.float32), (0, 1, 2))
        text = jax.jit(total).lower(q, k, k, ids).compile().as_text()
        return set(re.findall(r"splash_mha_[a-z]+_segmented", text))

    found = {}
    for topology, *sizes in (("v5p:2x2x1", True, 2048, 6, 2, 128), ("v6e:2x2", False, 1001, 4, 4, 64, 30.0)):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        axis_types = (jax.sharding.AxisType.Explicit,) * 2
        mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=axis_types, devices=devices)
        with jax.set_mesh(mesh):
            found[topology] = sorted(compiled(mesh, *sizes))
    print(json.dumps(found))


if __name__ == "__main__":
    compile_for_tpus()
