"""Refusals, one-token decoding, other people's implementations, and use under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from jaxhybrid_kernels import api, dplr_attention, linear_attention, linear_attention_step, register
from jaxhybrid_kernels.dplr import api as dplr_api
from jaxhybrid_kernels.triangular_inverse import inverse_unit_lower
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)


def float32(case):
    return {name: jnp.asarray(array, jnp.float32) for name, array in case.arrays.items()}


@pytest.mark.parametrize("name", ["pallas_cpu", "fast"])
def test_unavailable_implementation_is_refused(suite, name):
    arrays = float32(suite.make_case("gated_deltanet", 8))
    with pytest.raises(ValueError, match=rf"implementation='{name}'.*available: reference, recurrent, xla"):
        linear_attention(**arrays, implementation=name)


@pytest.mark.parametrize(
    ("platform", "tokens", "changes", "chosen"),
    [
        ("cpu", 2, {}, "xla"),
        ("cpu", 1, {}, "recurrent"),
        ("tpu", 2, {}, "pallas_tpu"),
        ("tpu", 1, {}, "recurrent"),
        ("tpu", 2, {"chunk_size": 32}, "xla"),
        ("tpu", 2, {"implementation": "reference"}, "reference"),
        ("cpu", 2, {"implementation": "pallas_tpu"}, "pallas_tpu"),
        ("tpu", 2, {"switch": "0"}, "xla"),
        ("tpu", 1, {"switch": "0"}, "recurrent"),
        ("tpu", 2, {"switch": "0", "implementation": "pallas_tpu"}, "pallas_tpu"),
        ("tpu", 2, {"switch": "1"}, "pallas_tpu"),
    ],
)
@pytest.mark.parametrize(("module", "operator", "arrays"), [(api, linear_attention, 3), (dplr_api, dplr_attention, 6)])
def test_choice(monkeypatch, module, operator, arrays, platform, tokens, changes, chosen):
    """Kernels by default where they are at home, for more than one token, unless they refuse or are switched off; by
    name anywhere."""
    monkeypatch.delenv("JAXHYBRID_LINEAR_KERNELS", raising=False)
    if (wanted := (changes := dict(changes)).pop("switch", None)) is not None:
        monkeypatch.setenv("JAXHYBRID_LINEAR_KERNELS", wanted)
    monkeypatch.setattr(register, "target_platform", lambda: platform)
    for name, entry in module.REGISTER.items():
        monkeypatch.setitem(module.REGISTER, name, entry._replace(run=lambda call, name=name: name))
    assert operator(*[jnp.zeros((1, tokens, 1, 16))] * arrays, **changes) == chosen


def test_a_new_entry_is_available_and_preferred(monkeypatch):
    mine = register.Implementation(lambda call: "mine", lambda call: None if call.sizes.K == 16 else "K is not 16")
    monkeypatch.setattr(api, "REGISTER", {"mine": mine} | api.REGISTER)
    q = jnp.zeros((1, 2, 1, 16))
    assert linear_attention(q, q, q) == linear_attention(q, q, q, implementation="mine") == "mine"
    with pytest.raises(ValueError, match="K is not 16"):
        linear_attention(q[..., :8], q[..., :8], q, implementation="mine")
    with pytest.raises(ValueError, match="pallas_gpu, mine"):
        linear_attention(q, q, q, implementation="other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 8, 2)}, "q has shape .*rank 4"),
        ({"q": (2, 8, 3, 16)}, "q has Hq=3 heads"),
        ({"q": (2, 8, 2, 8)}, "q has shape"),
        ({"k": (2, 8, 4, 16)}, "k has Hk=4 heads"),
        ({"k": (2, 9, 2, 16)}, "k has shape"),
        ({"v": (2, 0, 2, 24)}, "v has shape"),
        ({"log_decay": (2, 8)}, "log_decay has shape"),
        ({"log_decay": (2, 8, 2, 24)}, "log_decay has shape"),
        ({"beta": (2, 8, 1)}, "beta has shape"),
        ({"initial_state": (2, 2, 24, 16)}, "initial_state has shape"),
        ({"segment_ids": (2, 7)}, "segment_ids has shape"),
    ],
)
def test_wrong_shapes_are_refused(suite, changes, message):
    arrays = float32(suite.make_case("gated_deltanet", 8))
    arrays |= {n: jnp.zeros(s, jnp.int32 if n == "segment_ids" else jnp.float32) for n, s in changes.items()}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arrays)


def test_wrong_kinds_are_refused(suite):
    arrays = float32(suite.make_case("gated_deltanet", 8))
    for changes, message in [
        ({"initial_state": arrays["initial_state"].astype(jnp.float16)}, "initial_state has dtype float16"),
        ({"q": arrays["q"].astype(jnp.int32)}, "q has dtype int32"),
        ({"segment_ids": jnp.ones((2, 8))}, "segment_ids has dtype float32"),
        ({"chunk_size": 48}, "chunk_size=48"),
        ({"scale": "half"}, "scale='half'"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_attention(**(arrays | changes))
    one = {name: array if name == "initial_state" else array[:, 0] for name, array in arrays.items()}
    one["state"] = one.pop("initial_state").astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="state has dtype bfloat16"):
        linear_attention_step(**one)


def test_steps_equal_the_sequence(suite, recurrence):
    Hq, Hk = (4, 2) if recurrence in ("gated_deltanet", "gla") else (1, 1)
    case = suite.make_case(recurrence, 20, Hq=Hq, Hk=Hk)
    arrays = float32(case)
    state = arrays.pop("initial_state")
    step = jax.jit(linear_attention_step, static_argnames="scale")
    outs = []
    for t in range(20):
        token = {"log_decay": None, "beta": None} | {name: array[:, t] for name, array in arrays.items()}
        out, state = step(**token, state=state, scale=0.3)
        outs.append(out)
    out, final = linear_attention(**float32(case), scale=0.3)
    assert suite.relative_error(np.stack(outs, axis=1), out) < 1e-5
    assert suite.relative_error(state, final) < 1e-5


@pytest.mark.parametrize("other", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_transformers_gated_delta_rule(suite, other, implementation):
    """Two key heads shared by four value heads."""
    case = suite.make_case("gated_deltanet", 100, Hq=2, Hk=2, N=4)
    q, k, v, g, beta, state = (torch.tensor(a, dtype=torch.float32) for a in case.arrays.values())
    q, k = (x.repeat_interleave(2, dim=2) for x in (q, k))  # older versions do not share heads by themselves
    expected, expected_state = other(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
    (out, final), _ = suite.run(case, implementation)
    assert suite.relative_error(out, expected.numpy()) < 2e-5
    assert suite.relative_error(final, expected_state.numpy()) < 2e-5


@pytest.mark.parametrize("size", [16, 64, 128])
def test_inverse_of_correlated_gram(size):
    """Residual of the definition, where the entries of the inverse stay near one and those of its powers do not."""
    rng = np.random.default_rng(0)
    k = np.sqrt(0.01) * rng.normal(size=(3, size, 32)) + np.sqrt(0.99) * rng.normal(size=(1, 1, 32))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    strict = np.tril(k @ k.swapaxes(-1, -2), -1)
    inverse = np.asarray(inverse_unit_lower(jnp.asarray(strict, jnp.float32)), np.float64)
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(size) + strict), atol=2e-6)


@pytest.mark.parametrize(
    ("recurrence", "implementation"),
    [("simple_gla", "xla"), ("gated_deltanet", "xla"), ("kimi_delta", "xla"), ("gated_deltanet", "pallas_tpu")],
)
def test_inside_shard_map_under_checkpoint(suite, recurrence, implementation):
    """Manual axes over the batch, the initial state replicated; rematerialised; the same gradients as outside."""
    case = suite.make_case(recurrence, 40)
    arrays = float32(case)
    arrays["initial_state"] = arrays["initial_state"][:1]
    segment_ids = jnp.where(jnp.arange(40) < 25, 1, 2)[None].repeat(2, axis=0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {name: P() if name == "initial_state" else P("data") for name in arrays}

    def loss(arrays, segment_ids):
        state = arrays["initial_state"] + jnp.zeros((2, 1, 1, 1))
        arguments = arrays | {"initial_state": state, "segment_ids": segment_ids}
        out, final = linear_attention(**arguments, implementation=implementation)
        return (jnp.sum(out**2) + jnp.sum(final**2))[None]

    def sharded(arrays):
        mapped = jax.shard_map(
            jax.checkpoint(loss),
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=P("data"),
            check_vma=implementation == "xla",  # JAX's interpreter of kernels does not know of manual axes
        )
        return jnp.sum(mapped(arrays, segment_ids))

    expected = jax.jit(jax.grad(lambda arrays: loss(arrays, segment_ids)[0]))(arrays)
    actual = jax.jit(jax.grad(sharded))(arrays)
    for name in arrays:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-5)
