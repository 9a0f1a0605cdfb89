"""A token of a layer between its projections: the kernel interpreted against its steps, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels import Places, Steps, linear_attention, linear_attention_token
from jaxhybrid_kernels.gpu.layer_token import Blocks, token_kernel
from jaxhybrid_kernels.layer_token import FEW, MANY, blocks_of

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"))
B, N, K = 2, 3, 64
PLACES = Places(q=N, k=0, v=3 * N, gate=2 * N)  # in no order of their own


def operands(per_channel=False, delta=True):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    decay = -jnp.abs(draw(B, N, K) if per_channel else draw(B, N))
    beta = jax.nn.sigmoid(draw(B, N)) if delta else None
    return draw(B, 4 * N * K + 5), decay, beta, draw(B, N, K, K), 1 + draw(K)


def steps(projections, decay, beta, state, scale, places, silu, norm_eps):
    """By the token recurrence in float32."""
    heads = projections[:, : 4 * N * K].reshape(B, 4, N, K)
    q, k, v, gate = (None if at is None else heads[:, at // N] for at in places)
    if silu:
        q, k, v = map(jax.nn.silu, (q, k, v))
    q, k, v, decay, beta = (x if x is None else x[:, None] for x in (q, k, v, decay, beta))
    out, state = linear_attention(
        q, k, v, decay, beta, initial_state=state, norm_eps=norm_eps, implementation="reference"
    )
    out = out[:, 0] / jnp.sqrt(jnp.mean(out[:, 0] ** 2, -1, keepdims=True) + 1e-5) * scale
    return (out if gate is None else out * jax.nn.silu(gate)).reshape(B, -1), state


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
    ("per_channel", "delta", "silu", "norm_eps", "places"),
    [
        (False, True, True, 1e-6, PLACES),  # Gated DeltaNet
        (True, False, False, None, PLACES),  # GLA
        (True, True, True, 1e-6, PLACES._replace(gate=None)),
        (False, False, False, 1e-6, PLACES._replace(gate=None)),
    ],
)
def test_equals_its_steps(implementation, per_channel, delta, silu, norm_eps, places):
    projections, decay, beta, state, scale = operands(per_channel, delta)
    results = linear_attention_token(
        projections, places, (decay, beta), state, out_norm=(scale, 1e-5), silu=silu, norm_eps=norm_eps,
        dtype=jnp.float32, implementation=implementation,
    )  # fmt: skip
    expected = steps(projections, decay, beta, state, scale, places, silu, norm_eps)
    for result, wanted in zip(results, expected):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_gates_come_from_the_projections(implementation):
    """From very slow decays, of which one plus the exponential would keep no digit, to nearly none left."""
    projections, _, _, state, scale = operands()
    a = jnp.asarray([[-20.0, -8.0, 1.0], [3.0, 0.1, 40.0]])
    b = jnp.asarray([[-3.0, 0.0, 2.0], [9.0, -1.0, 0.3]])
    A_log, bias = jnp.asarray([1.0, -0.5, 0.0]), jnp.asarray([0.5, -1.0, 0.2])
    first = 4 * N * K + 5
    row = jnp.concatenate([projections, a, b], axis=1)
    results = linear_attention_token(
        row, PLACES, Steps(first, first + N, A_log, bias), state, out_norm=(scale, 1e-5), silu=True, norm_eps=1e-6,
        dtype=jnp.float32, implementation=implementation,
    )  # fmt: skip
    exact = np.logaddexp(0, np.asarray(a, np.float64) + np.asarray(bias, np.float64))
    decay = jnp.asarray(-np.exp(np.asarray(A_log, np.float64)) * exact, jnp.float32)
    expected = steps(projections, decay, jax.nn.sigmoid(b), state, scale, PLACES, True, 1e-6)
    for result, wanted in zip(results, expected):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("blocks", [Blocks(64, 4), Blocks(32, 4, 1), Blocks(16, 4, 2)])
def test_every_division_gives_the_same(blocks):
    projections, decay, beta, state, scale = operands()
    results = token_kernel(
        projections, PLACES, (decay, beta), state, scale, 1e-5, True, 1e-6, jnp.float32, blocks, interpret=True
    )
    expected = steps(projections, decay, beta, state, scale, PLACES, True, 1e-6)
    for result, wanted in zip(results, expected):
        np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=2e-5)


def test_few_states_are_taken_whole():
    assert blocks_of(1, 12, 128, 128) == FEW
    assert blocks_of(64, 12, 128, 128) == MANY
    assert blocks_of(1, 12, 64, 64).values == 64


def test_the_kernel_rounds_less_than_xla_in_bfloat16():
    projections, decay, beta, state, scale = operands()
    out, after = steps(projections, decay, beta, state, scale, PLACES, True, 1e-6)
    errors = {}
    for form in ("xla", "triton"):
        results = linear_attention_token(
            projections, PLACES, (decay, beta), state, out_norm=(scale, 1e-5), silu=True, norm_eps=1e-6,
            dtype=jnp.bfloat16, implementation=form,
        )  # fmt: skip
        assert results[0].dtype == jnp.bfloat16
        errors[form] = [float(jnp.max(jnp.abs(x - wanted))) for x, wanted in zip(results, (out, after))]
    assert errors["triton"][0] <= errors["xla"][0] < 0.2
    assert errors["triton"][1] <= errors["xla"][1] < 0.05


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"gates": Steps(0, 0, jnp.zeros(N), jnp.zeros(N, jnp.float16))}, "bias has dtype float16"),
        ({"state_BNKV": jnp.zeros((B, N, 48, 48))}, r"state has shape \(2, 3, 48, 48\)"),
        ({"gates": (jnp.zeros((B, N), jnp.bfloat16), None)}, "log_decay has dtype bfloat16"),
    ],
)
def test_refusals_name_the_value(changed, told):
    projections, decay, beta, state, scale = operands()
    given = {"gates": (decay, beta), "state_BNKV": state} | changed
    with pytest.raises(ValueError, match=told):
        linear_attention_token(
            projections, PLACES, **given, out_norm=(scale, 1e-5), dtype=jnp.float32, implementation="triton"
        )


def test_lowered_for_cuda_it_is_one_kernel_that_writes_the_state_in_place():
    projections, _, _, state, scale = operands()
    run = jax.jit(
        lambda state, *given: linear_attention_token(
            given[0], PLACES, Steps(0, N, *given[1:3]), state, out_norm=(given[3], 1e-5), dtype=jnp.bfloat16
        )
    )
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(H100):
        exported = export.export(run, platforms=["cuda"], disabled_checks=[check])
        text = exported(state, projections, jnp.zeros(N), jnp.zeros(N), scale).mlir_module()
    assert text.count("xla.gpu.triton") == 1
    assert "output_operand_alias" in text
    assert "dot_general" not in text
