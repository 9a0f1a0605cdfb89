"""The Hopper kernels: interpreted against the float64 token recurrence, and lowered for CUDA without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jaxhybrid_kernels import api, linear_attention, numerics, register
from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu import linear_attention as gpu_linear_attention
from jaxhybrid_kernels.gpu.channel_gradients import channel_gradients_kernel
from jaxhybrid_kernels.gpu.channel_prepare import channel_prepare_kernel
from jaxhybrid_kernels.gpu.gates import GATES
from jaxhybrid_kernels.gpu.gradients import gradients_kernel
from jaxhybrid_kernels.gpu.plan import Plan
from jaxhybrid_kernels.gpu.prepare import prepare_kernel
from jaxhybrid_kernels.gpu.recurrence import recurrence_kernel
from jaxhybrid_kernels.validation import check_sequence

CASES = {
    "gated": ("gated_deltanet", {}),
    "shared keys": ("gated_deltanet", {"N": 2, "K": 128, "V": 128}),
    "no decay, correlated keys": ("deltanet", {"correlation": 0.9, "rate": 2.0}),
    "additive": ("linear_attention", {}),
    "strong decay": ("simple_gla", {"decay": 5.0}),
    "kimi": ("kimi_delta", {}),
    "kimi, shared keys": ("kimi_delta", {"N": 2, "K": 128, "V": 128}),
    "kimi, no decay, correlated keys": ("kimi_delta", {"correlation": 0.9, "rate": 2.0, "decay": 0.0}),
    "kimi, strong decay": ("kimi_delta", {"decay": 5.0, "K": 128}),
    "gla": ("gla", {}),
    "gla, shared keys, strong decay": ("gla", {"decay": 5.0, "N": 2, "V": 128}),
}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(suite, name):
    recurrence, sizes = CASES[name]
    case = suite.make_case(recurrence, **{"B": 1, "Hq": 1, "Hk": 1, "N": 1, "K": 64, "V": 64} | sizes)
    suite.check_bfloat16(case, "pallas_gpu")


@pytest.mark.parametrize(
    ("recurrence", "fused"),
    [
        ("simple_gla", False),
        ("simple_gla", True),
        ("gated_deltanet", False),
        ("gated_deltanet", True),
        ("gla", False),
        ("kimi_delta", False),
    ],
)
def test_packed(suite, recurrence, fused, monkeypatch):
    monkeypatch.setattr(gpu_linear_attention, "FILLED", 1 if fused else 100)
    jax.clear_caches()
    case = suite.make_case(recurrence, B=1, Hq=1, Hk=1, N=1, K=64, V=64)
    case.segment_ids = np.repeat([[1, 1, 0, 2, 3, 3, 3, 1, 0, 4]], 13, axis=1)
    suite.check_bfloat16(case, "pallas_gpu")


@pytest.mark.parametrize(
    ("recurrence", "packed", "K", "V"),
    [
        ("simple_gla", True, 64, 64),
        ("gated_deltanet", False, 64, 64),
        ("gated_deltanet", True, 128, 128),
        ("gated_deltanet", True, 64, 128),
        ("gla", False, 64, 64),
        ("kimi_delta", True, 128, 64),
    ],
)
def test_spans(suite, recurrence, packed, K, V, monkeypatch):
    """Four spans of one or two chunks, side by side."""
    monkeypatch.setattr(gpu_linear_attention, "SHORTEST_SPAN", 1)
    monkeypatch.setattr(gpu_linear_attention, "MOST_SPANS", 4)
    jax.clear_caches()
    case = suite.make_case(recurrence, 330, B=1, Hq=1, Hk=1, N=1, K=K, V=V, decay=0.02)
    if packed:
        case.segment_ids = np.repeat([[1, 1, 0, 2, 2, 2, 2, 2, 2, 2]], 33, axis=1)
    suite.check_bfloat16(case, "pallas_gpu")


@pytest.mark.parametrize(
    ("heads", "T", "K", "V", "spans", "blocks"),
    [
        (16, 32768, 128, 128, 5, 2),
        (9, 32768, 64, 64, 8, 1),
        (4, 32768, 64, 128, 12, 1),
        (1, 32768, 128, 128, 16, 2),
        (8, 4096, 128, 128, 4, 2),
        (16, 2048, 128, 128, 1, 1),  # too short
        (32, 32768, 128, 128, 1, 1),
        (128, 4096, 128, 128, 1, 2),
    ],
)
def test_plan_of_spans(heads, T, K, V, spans, blocks):
    """The summary's thread blocks, at most one per multiprocessor, decide."""
    k, v = (jax.ShapeDtypeStruct((1, T, heads, width), jnp.bfloat16) for width in (K, V))
    inputs = Inputs(k, k, v, None, None, None)
    plan = gpu_linear_attention.make_plan(inputs, None, 1.0, check_sequence(*inputs, None))
    assert (plan.spans, plan.blocks) == (spans, blocks)
    assert V % (blocks * 64) == 0
    assert spans == 1 or K % (blocks * 64) == 0


@pytest.mark.parametrize(
    ("form", "asked"), [("prepared", "state"), ("fused", "out"), ("spans", "out"), ("spans", "state")]
)
def test_without_initial_state_and_one_result_only(suite, monkeypatch, form, asked):
    """What is absent is neither read nor made up: gradients of one result, from the zero state."""
    monkeypatch.setattr(gpu_linear_attention, "FILLED", 0 if form == "fused" else 1000)
    if form == "spans":
        monkeypatch.setattr(gpu_linear_attention, "SHORTEST_SPAN", 1)
        monkeypatch.setattr(gpu_linear_attention, "FEWEST_SPANS", 2)
    jax.clear_caches()
    arrays = dict(suite.make_case("gated_deltanet", B=1, Hq=1, Hk=1, N=1, K=64, V=64).arrays)
    del arrays["initial_state"]

    def gradients(implementation, dtype):
        def loss(arrays):
            out, state = linear_attention(**arrays, implementation=implementation)
            return jnp.sum((out if asked == "out" else state).astype(jnp.float32) ** 2)

        exact = {"log_decay", "beta"}
        return jax.grad(loss)({n: jnp.asarray(a, jnp.float32 if n in exact else dtype) for n, a in arrays.items()})

    actual, expected = gradients("pallas_gpu", jnp.bfloat16), gradients("reference", jnp.float32)
    for name, gradient in expected.items():
        a, b = (np.asarray(x, np.float64).ravel() for x in (actual[name], gradient))
        assert a @ b / np.sqrt((a @ a) * (b @ b) + 1e-30) > 0.999 or not (a.any() or b.any()), name


def lower(function, *arguments):
    """For CUDA, without a GPU."""
    unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    export.export(jax.jit(function), platforms=["cuda"], disabled_checks=unchecked)(*arguments)


@pytest.mark.parametrize(("K", "V", "blocks", "delta"), [(128, 128, 2, True), (64, 64, 1, True), (64, 128, 1, False)])
def test_lowers_for_cuda(K, V, blocks, delta):
    plan = Plan(
        B=1,
        T=256,
        n=4,
        Hq=1,
        Hk=1,
        N=2,
        K=K,
        V=V,
        scale=1.0,
        delta=delta,
        blocks=blocks,
        fused=False,
        started=True,
        interpret=False,
    )

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, v, float32 = array(1, 256, 1, K), array(1, 256, 2, V), jnp.float32
    matrices, gates = array(1, 2, 4, plan.matrices, 64, 64), array(1, 4, 2, GATES, 64, dtype=float32)
    lower(prepare_kernel(plan), q, q, gates)
    start = array(1, 2, 1, V, K, dtype=float32)
    for reverse in (False, True):
        lower(recurrence_kernel(plan, True, reverse, started=True), q, q, v, gates, matrices, start)
        lower(recurrence_kernel(plan._replace(fused=True), True, reverse), q, q, v, gates)
        rows = V if reverse else V + K
        summary = recurrence_kernel(plan._replace(spans=3, blocks=1), False, reverse, started=True, summary=True)
        lower(summary, q, q, v, gates, matrices, array(1, 2, 2, rows, K, dtype=float32))
    states = array(1, 2, 4, V, K)
    lower(gradients_kernel(plan), q, q, v, v, v, states, states, gates)
    plan = plan._replace(per_channel=True)
    gated, decays, carry = array(1, 256, 2, K), array(1, 256, 2, K, dtype=float32), array(1, 2, 4, K, dtype=float32)
    lower(channel_prepare_kernel(plan), q, q, decays, gates)
    for reverse in (False, True):
        kernel = recurrence_kernel(plan, True, reverse, started=True)
        lower(kernel, gated, gated, v, gates, matrices, gated, carry, start)
    lower(channel_gradients_kernel(plan), q, q, v, v, v, states, states, decays, carry)


@pytest.mark.parametrize("form", ["prepared", "fused", "spans", "by channel"])
@pytest.mark.parametrize("states", [False, True])
def test_lowers_inside_shard_map_under_checkpoint(form, states):
    """With manual axes checked, which the interpreter cannot do; both directions, with and without initial and final
    states."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sizes = {"B": 1, "T": 192, "n": 3, "Hq": 1, "Hk": 1, "N": 2, "K": 64, "V": 64}
    forms = {"fused": form == "fused", "spans": 3 if form == "spans" else 1}
    per_channel = form == "by channel"
    plan = Plan(
        **sizes, **forms, scale=1.0, delta=True, per_channel=per_channel, started=states, blocks=1, interpret=False
    )

    def local(q, k, v, log_decay, beta, state=None):
        inputs = Inputs(q, k, v, log_decay, beta, None)
        out, final = jax.checkpoint(gpu_linear_attention.gpu_operator, static_argnums=0)(plan, inputs, state)
        return out.astype(jnp.float32), final

    def loss(*arguments):
        split = jax.P("data")
        specs = (split,) * len(arguments)
        out, final = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(split, split))(*arguments)
        return jnp.sum(out**2) + (jnp.sum(final) if states else 0.0)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P("data")))

    float32 = jnp.float32
    narrow, state = array(2, 192, 2, dtype=float32), array(2, 2, 64, 64, dtype=float32)
    q, v = array(2, 192, 1, 64), array(2, 192, 2, 64)
    with jax.set_mesh(mesh):
        decays = array(2, 192, 2, 64, dtype=float32) if per_channel else narrow
        arguments = (q, q, v, decays, narrow, *([state] if states else []))
        lower(jax.grad(loss, argnums=tuple(range(len(arguments)))), *arguments)


@pytest.mark.parametrize(
    ("capability", "changes", "chosen"),
    [
        ("9.0", {}, True),
        ("8.0", {}, False),
        ("9.0", {"v": jnp.zeros((1, 4, 1, 32), jnp.bfloat16)}, False),
        ("9.0", {"chunk_size": 32}, False),
        ("9.0", {"implementation": "xla"}, False),
    ],
)
def test_default_on_a_gpu(monkeypatch, capability, changes, chosen):
    """The kernels where they take the arguments, the form for XLA elsewhere."""
    for module in (register, numerics):
        monkeypatch.setattr(module, "target_platform", lambda: "gpu")
    monkeypatch.setattr(numerics, "gpu_capability", lambda: capability)
    for name, entry in api.REGISTER.items():
        monkeypatch.setitem(api.REGISTER, name, entry._replace(run=lambda call, name=name: name))
    q = jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    assert linear_attention(**{"q": q, "k": q, "v": q} | changes) == ("pallas_gpu" if chosen else "xla")


def test_split_arrays_are_refused():
    """Outside of shard_map, on a mesh with explicit axes."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        q = jax.device_put(jnp.zeros((2, 4, 1, 64), jnp.bfloat16), jax.NamedSharding(mesh, jax.P("data")))
        with pytest.raises(ValueError, match=r"split over \['data'\]; use jax.shard_map"):
            linear_attention(q, q, q, implementation="pallas_gpu")


def test_refusals():
    q = jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="K=48"):
        linear_attention(q[..., :48], q[..., :48], q, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="v has dtype float32"):
        linear_attention(q, q, q.astype(jnp.float32), implementation="pallas_gpu")
    with pytest.raises(ValueError, match="Hq=2"):
        linear_attention(jnp.repeat(q, 2, axis=2), q, q, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="chunk_size=32"):
        linear_attention(q, q, q, chunk_size=32, implementation="pallas_gpu")
