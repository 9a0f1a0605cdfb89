"""Linear attention by the Hopper kernels, with its custom gradient, and what they refuse."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.call import Call
from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.differentiable import differentiable
from jaxhybrid_kernels.gpu.channel_gradients import channel_gradients_kernel
from jaxhybrid_kernels.gpu.channel_prepare import channel_prepare_kernel
from jaxhybrid_kernels.gpu.gates import beta_gradient, decay_gradient, make_gates
from jaxhybrid_kernels.gpu.gradients import gradients_kernel
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import prepare_kernel
from jaxhybrid_kernels.gpu.spans import run_backward, run_forward
from jaxhybrid_kernels.numerics import hopper_refusal, target_platform, varying_alike
from jaxhybrid_kernels.segments import segment_starts, zero_padding
from jaxhybrid_kernels.validation import Sizes

WIDTHS = (64, 128)
MULTIPROCESSORS = 132
FILLED = 100  # thread blocks that leave few multiprocessors idle
FEWEST_SPANS, MOST_SPANS = 4, 16  # two do nearly all of the work twice and save nothing
SHORTEST_SPAN = 16  # chunks


def gpu_refusal(call: Call) -> str | None:
    """Why the kernels cannot take these arguments here, naming the value in the way; None if they can."""
    if (reason := call.split_refusal("pallas_gpu")) is not None:
        return reason
    inputs, sizes = call.inputs, call.sizes
    if refusal := hopper_refusal("implementation='pallas_gpu'"):
        return refusal
    for name, letter, width in (("k", "K", sizes.K), ("v", "V", sizes.V)):
        if width not in WIDTHS:
            return f"{name} has {letter}={width} channels per head, pallas_gpu takes 64 or 128."
    for name, array in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
        if array.dtype != jnp.bfloat16:
            return f"{name} has dtype {array.dtype}, pallas_gpu takes bfloat16."
    for name, exact in (("log_decay", inputs.log_decay), ("beta", inputs.beta), ("initial_state", call.initial_state)):
        if exact is not None and exact.dtype == jnp.float64:
            return f"{name} has dtype float64, pallas_gpu computes in float32."
    if sizes.Hq > sizes.N:
        return f"q has Hq={sizes.Hq} heads, pallas_gpu takes at most one query per state (N={sizes.N})."
    if call.chunk_size not in (None, CHUNK):
        return f"chunk_size={call.chunk_size!r}: pallas_gpu takes chunks of {CHUNK} tokens only."
    return None


def make_plan(inputs: Inputs, initial_state: jax.Array | None, scale: float, sizes: Sizes) -> Plan:
    per_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
    states, n, blocks = sizes.B * sizes.N, -(-sizes.T // CHUNK), sizes.V // BLOCK
    # As many spans as their summary, which has V + K rows and leaves one span out, finds multiprocessors for.
    together = math.gcd(sizes.K, sizes.V)
    in_summary = states * (sizes.K + sizes.V) // together
    spans = min(1 + MULTIPROCESSORS // in_summary, n // SHORTEST_SPAN, MOST_SPANS)
    if spans >= FEWEST_SPANS:
        blocks = together // BLOCK
    else:
        spans = 1
        if states * blocks <= MULTIPROCESSORS:
            blocks = 1  # the parts of a value width get a multiprocessor each
    return Plan(
        B=sizes.B,
        T=sizes.T,
        n=n,
        Hq=sizes.Hq,
        Hk=sizes.Hk,
        N=sizes.N,
        K=sizes.K,
        V=sizes.V,
        scale=scale,
        delta=inputs.beta is not None,
        started=initial_state is not None,
        blocks=blocks,
        fused=states >= FILLED and not per_channel,
        interpret=target_platform() == "cpu",
        per_channel=per_channel,
        spans=spans,
    )


def gpu_linear_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `linear_attention`. The kernels need not read an initial state of zeros."""
    call = call.normalized()
    inputs, state = varying_alike(call.inputs, None if call.initial_state is None else call.state())
    return gpu_operator(make_plan(inputs, state, call.scale, call.sizes), inputs, state)


class Gated(NamedTuple):
    """Operands with one decay per channel in them, see channel_prepare.py."""

    q_in: jax.Array  # [B,T,N,K] in whole chunks, bfloat16
    k_in: jax.Array  # without the delta rule nobody reads it
    k_out: jax.Array
    carry: jax.Array  # [B,N,n,K] float32


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs, bfloat16 but for the gates."""

    gates: jax.Array  # [B,n,N,6,64]
    matrices: jax.Array | None  # [B,N,n,1 or 2,64,64]; None if fused: the backward makes them again
    states: jax.Array  # [B,N,n,V,K] entry states
    updates: jax.Array | None  # [B,T,N,V] in whole chunks; None without the delta rule: they are v
    transitions: jax.Array | None  # of spans, see spans.py
    gated: Gated | None  # None without decays per channel


def gpu_forward(
    inputs: Inputs, initial_state: jax.Array | None, plan: Plan, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals | None]:
    """((out, final state), residuals if they are to be kept); initial_state [B,N,K,V] float32."""
    q, k, v = (_whole_chunks(x, inputs.segment_ids, plan) for x in (inputs.q, inputs.k, inputs.v))
    gates, gated, matrices = make_gates(inputs, plan), None, None
    if plan.per_channel:
        q_in, *k_in, k_out, carry, matrices = channel_prepare_kernel(plan)(q, k, _parted_decays(inputs, plan), gates)
        gated = Gated(q_in, k_in[0] if plan.delta else k_out, k_out, carry)
    elif not plan.fused:
        matrices = prepare_kernel(plan)(q, k, gates)
    start = None if initial_state is None else _transposed(initial_state)
    run = run_forward(plan, _operands(q, k, v, gates, matrices, gated), start, keep)
    out, *kept = run.kept
    residuals = None
    if keep:
        states, *updates = kept
        residuals = Residuals(gates, matrices, states, updates[0] if updates else None, run.transitions, gated)
    return (out[:, : plan.T], _transposed(run.last)), residuals


def _operands(
    q: jax.Array, k: jax.Array, x: jax.Array, gates: jax.Array, matrices: jax.Array | None, gated: Gated | None
) -> list[jax.Array]:
    """What both directions of the recurrence read, see recurrence.py."""
    if gated is not None:
        q, k = gated.q_in, gated.k_in
    more = (matrices, *(gated[2:] if gated is not None else ()))
    return [q, k, x, gates, *(array for array in more if array is not None)]


def _transposed(state: jax.Array) -> jax.Array:
    """[B,N,K,V] <-> [B,N,V,K]"""
    return jnp.swapaxes(state, 2, 3)


def _whole_chunks(x: jax.Array, segment_ids: jax.Array | None, plan: Plan) -> jax.Array:
    """x [B,T,H,width] with zeros at padding tokens and after the end, up to a whole chunk."""
    x = zero_padding(x, segment_ids)
    return jnp.pad(x, ((0, 0), (0, plan.padding), (0, 0), (0, 0))) if plan.padding else x


def _decays(inputs: Inputs, plan: Plan) -> jax.Array:
    """log_decay per channel [B,T,N,K] in whole chunks, float32."""
    assert inputs.log_decay is not None
    return _whole_chunks(inputs.log_decay.astype(jnp.float32), inputs.segment_ids, plan)


def _parted_decays(inputs: Inputs, plan: Plan) -> jax.Array:
    """The same, minus infinity where a segment begins."""
    decays = _decays(inputs, plan)
    if inputs.segment_ids is None:
        return decays
    starts = jnp.pad(segment_starts(inputs.segment_ids), ((0, 0), (0, plan.padding)))
    return jnp.where(starts[:, :, None, None], -jnp.inf, decays)


def gpu_backward(
    inputs: Inputs, residuals: Residuals, d_out: jax.Array | None, d_final: jax.Array | None, plan: Plan
) -> tuple[Inputs, jax.Array | None]:
    """(Gradients of the inputs, gradient of the initial state); None for the gradient of a result nobody used."""
    if d_out is None:
        d_out = jnp.zeros_like(inputs.v)
    given = (inputs.q, inputs.k, inputs.v, d_out.astype(jnp.bfloat16))
    q, k, v, d_out = (_whole_chunks(x, inputs.segment_ids, plan) for x in given)
    gates, gated = residuals.gates, residuals.gated
    start = None if d_final is None else _transposed(d_final)
    reads = _operands(q, k, d_out, gates, residuals.matrices, gated)
    d_initial, d_v, d_states = run_backward(plan, reads, start, residuals.transitions)
    operands = (q, k, v if residuals.updates is None else residuals.updates, d_v, d_out, residuals.states, d_states)
    if gated is None:
        d_q, d_k, sums, *written = gradients_kernel(plan)(*operands, gates)
        d_decays = decay_gradient(inputs, sums, plan)
    else:
        channel_gradients = channel_gradients_kernel(plan)
        d_q, d_k, d_decays, *written = channel_gradients(*operands, _parted_decays(inputs, plan), gated.carry)
        assert inputs.log_decay is not None
        d_decays = _like(d_decays, inputs.log_decay, inputs.segment_ids).astype(inputs.log_decay.dtype)
    d_beta = beta_gradient(inputs, gates, written[0] if written else None, plan)
    d_q, d_k, d_v = (
        _like(gradient, x, inputs.segment_ids) for gradient, x in ((d_q, inputs.q), (d_k, inputs.k), (d_v, inputs.v))
    )
    return Inputs(d_q, d_k, d_v, d_decays, d_beta, None), _transposed(d_initial) if plan.started else None


def _like(gradient: jax.Array, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """One gradient per value head in whole chunks -> that of x [B,T,heads,width]; zero on padding."""
    B, T, heads, width = x.shape
    gradient = gradient[:, :T]
    if heads != gradient.shape[2]:
        gradient = gradient.reshape(B, T, heads, -1, width).astype(jnp.float32).sum(axis=3).astype(x.dtype)
    return zero_padding(gradient, segment_ids)


gpu_operator = differentiable(gpu_forward, gpu_backward, unused_is_none=True)
