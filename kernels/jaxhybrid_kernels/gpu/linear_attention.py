"""Linear attention by the Hopper kernels, with its custom gradient, and what they refuse."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.gpu.gates import gate_gradients, make_gates
from jaxhybrid_kernels.gpu.gradients import gradients_kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import prepare_kernel
from jaxhybrid_kernels.gpu.recurrence import recurrence_kernel
from jaxhybrid_kernels.numerics import target_platform
from jaxhybrid_kernels.segments import zero_padding
from jaxhybrid_kernels.validation import Sizes

WIDTHS = (64, 128)
HOPPER = "9.0"
MULTIPROCESSORS = 132
FILLED = 100  # thread blocks that leave few multiprocessors idle


def gpu_refusal(inputs: Inputs, initial_state: jax.Array | None, chunk_size: int | None, sizes: Sizes) -> str | None:
    """Why the kernels cannot take these arguments here, naming the value in the way; None if they can."""
    platform = target_platform()
    if platform not in ("gpu", "cuda", "cpu"):
        return f"implementation='pallas_gpu' runs on GPUs, and on CPUs interpreted; the platform is {platform!r}."
    if platform != "cpu" and (capability := str(jax.devices("gpu")[0].compute_capability)) != HOPPER:
        return f"implementation='pallas_gpu' needs compute capability {HOPPER}; this GPU has {capability}."
    for name, letter, width in (("k", "K", sizes.K), ("v", "V", sizes.V)):
        if width not in WIDTHS:
            return f"{name} has {letter}={width} channels per head, pallas_gpu takes 64 or 128."
    for name, array in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        if array.dtype != jnp.bfloat16:
            return f"{name} has dtype {array.dtype}, pallas_gpu takes bfloat16."
    for name, exact in (("log_decay", inputs.log_decay), ("beta", inputs.beta), ("initial_state", initial_state)):
        if exact is not None and exact.dtype == jnp.float64:
            return f"{name} has dtype float64, pallas_gpu computes in float32."
    if inputs.log_decay is not None and inputs.log_decay.ndim == 4:
        return f"log_decay has shape {inputs.log_decay.shape}, pallas_gpu takes no decay per channel."
    if sizes.Hq > sizes.N:
        return f"q has Hq={sizes.Hq} heads, pallas_gpu takes at most one query per state (N={sizes.N})."
    if chunk_size not in (None, CHUNK):
        return f"chunk_size={chunk_size!r}: pallas_gpu takes chunks of {CHUNK} tokens only."
    return None


def make_plan(inputs: Inputs, scale: float, sizes: Sizes) -> Plan:
    blocks = sizes.V // BLOCK
    if sizes.B * sizes.N * blocks <= MULTIPROCESSORS:
        blocks = 1  # few heads: the parts of a value width get a multiprocessor each
    return Plan(
        B=sizes.B,
        T=sizes.T,
        n=-(-sizes.T // CHUNK),
        Hq=sizes.Hq,
        Hk=sizes.Hk,
        N=sizes.N,
        K=sizes.K,
        V=sizes.V,
        scale=scale,
        delta=inputs.beta is not None,
        blocks=blocks,
        fused=sizes.B * sizes.N >= FILLED,
        interpret=target_platform() == "cpu",
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gpu_linear_attention(plan: Plan, inputs: Inputs, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `linear_attention`; initial_state [B,N,K,V] float32."""
    return _compute(plan, inputs, initial_state, keep=False)[0]


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs, bfloat16 but for the gates."""

    gates: jax.Array  # [B,N,n,6,64]
    matrices: jax.Array  # [B,N,n,1 or 2,64,64]
    states: jax.Array  # [B,N,n,V,K] entry states
    updates: jax.Array | None  # [B,T,N,V] in whole chunks; None without the delta rule: they are v


def _compute(
    plan: Plan, inputs: Inputs, initial_state: jax.Array, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals | None]:
    """((out, final state), what the backward needs if keep)."""
    q, k, v = (_whole_chunks(x, inputs.segment_ids, plan) for x in (inputs.q, inputs.k, inputs.v))
    gates = make_gates(inputs, plan)
    start = jnp.swapaxes(initial_state, 2, 3)
    if plan.fused:
        out, final, *kept = recurrence_kernel(plan, keep=keep, fused=True)(q, k, v, gates, start)
    else:
        matrices = prepare_kernel(plan)(q, k, gates)
        out, final, *kept = recurrence_kernel(plan, keep=keep)(q, k, v, gates, start, matrices)
        kept[1:1] = [matrices]
    residuals = None
    if keep:
        states, matrices, *updates = kept
        residuals = Residuals(gates, matrices, states, updates[0] if updates else None)
    return (out[:, : plan.T], jnp.swapaxes(final, 2, 3)), residuals


def _whole_chunks(x: jax.Array, segment_ids: jax.Array | None, plan: Plan) -> jax.Array:
    """x [B,T,H,width] with zeros at padding tokens and after the end, up to a whole chunk."""
    x = zero_padding(x, segment_ids)
    return jnp.pad(x, ((0, 0), (0, plan.padding), (0, 0), (0, 0))) if plan.padding else x


def _forward(
    plan: Plan, inputs: Inputs, initial_state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, Residuals | None]]:
    results, kept = _compute(plan, inputs, initial_state, keep=True)
    return results, (inputs, kept)


def _backward(
    plan: Plan, kept: tuple[Inputs, Residuals], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array]:
    inputs, residuals = kept
    d_out, d_final = gradients
    given = (inputs.q, inputs.k, inputs.v, d_out.astype(jnp.bfloat16))
    q, k, v, d_out = (_whole_chunks(x, inputs.segment_ids, plan) for x in given)
    gates = residuals.gates
    kernel = recurrence_kernel(plan, keep=True, reverse=True)
    d_v, d_initial, d_states = kernel(q, k, d_out, gates, jnp.swapaxes(d_final, 2, 3), residuals.matrices)
    updates = v if residuals.updates is None else residuals.updates
    kernel = gradients_kernel(plan)
    d_q, d_k, vectors, dots = kernel(q, k, updates, d_v, d_out, residuals.states, d_states, gates)
    d_inputs = gate_gradients(inputs, gates, vectors, dots, plan)
    d_q, d_k, d_v = (
        _like(gradient, x, inputs.segment_ids) for gradient, x in ((d_q, inputs.q), (d_k, inputs.k), (d_v, inputs.v))
    )
    return d_inputs._replace(q=d_q, k=d_k, v=d_v), jnp.swapaxes(d_initial, 2, 3)


def _like(gradient: jax.Array, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """One gradient per value head in whole chunks -> that of x [B,T,heads,width]; zero on padding."""
    B, T, heads, width = x.shape
    gradient = gradient[:, :T]
    if heads != gradient.shape[2]:
        gradient = gradient.reshape(B, T, heads, -1, width).astype(jnp.float32).sum(axis=3).astype(x.dtype)
    return zero_padding(gradient, segment_ids)


gpu_linear_attention.defvjp(_forward, _backward)
