"""Linear attention by the Hopper kernels, with its custom gradient, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.chunk_layout import Inputs, chunk_output_gradient, make_chunks
from jaxhybrid_kernels.chunked import Residuals, chunk_operands
from jaxhybrid_kernels.chunked_backward import StepGradients, input_gradients
from jaxhybrid_kernels.gpu.gates import make_gates
from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK, Plan
from jaxhybrid_kernels.gpu.prepare import prepare_kernel
from jaxhybrid_kernels.gpu.recurrence import recurrence_kernel
from jaxhybrid_kernels.numerics import target_platform
from jaxhybrid_kernels.segments import zero_padding
from jaxhybrid_kernels.validation import Sizes

WIDTHS = (64, 128)
HOPPER = "9.0"
MULTIPROCESSORS = 132


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
        interpret=target_platform() == "cpu",
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gpu_linear_attention(
    plan: Plan, sizes: Sizes, inputs: Inputs, initial_state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `linear_attention`; initial_state [B,N,K,V] float32."""
    return _compute(plan, inputs, initial_state, keep=False)[0]


def _compute(
    plan: Plan, inputs: Inputs, initial_state: jax.Array, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """((out, final state), (matrices, entry states if kept))."""
    q, k, v = (_whole_chunks(x, inputs.segment_ids, plan) for x in (inputs.q, inputs.k, inputs.v))
    gates = make_gates(inputs, plan)
    matrices = prepare_kernel(plan)(q, k, gates.pairs)
    kernel = recurrence_kernel(plan, reverse=False, keep=keep)
    out, final, *states = kernel(q, k, v, matrices, gates.steps, jnp.swapaxes(initial_state, 2, 3))
    return (out[:, : plan.T], jnp.swapaxes(final, 2, 3)), (matrices, *states)


def _whole_chunks(x: jax.Array, segment_ids: jax.Array | None, plan: Plan) -> jax.Array:
    """x [B,T,H,width] with zeros at padding tokens and after the end, up to a whole chunk."""
    x = zero_padding(x, segment_ids)
    return jnp.pad(x, ((0, 0), (0, plan.padding), (0, 0), (0, 0))) if plan.padding else x


def _forward(
    plan: Plan, sizes: Sizes, inputs: Inputs, initial_state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, tuple[jax.Array, ...]]]:
    results, kept = _compute(plan, inputs, initial_state, keep=True)
    return results, (inputs, kept)


def _backward(
    plan: Plan, sizes: Sizes, kept: tuple[Inputs, tuple[jax.Array, ...]], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array]:
    """The reverse recurrence in a kernel of its own, what follows from it in XLA."""
    inputs, (matrices, states) = kept
    d_out, d_final = gradients
    d_out = d_out.astype(jnp.bfloat16)
    q, k, x = (_whole_chunks(a, inputs.segment_ids, plan) for a in (inputs.q, inputs.k, d_out))
    kernel = recurrence_kernel(plan, reverse=True, keep=True)
    d_updates, d_initial, d_exits = kernel(
        q, k, x, matrices, make_gates(inputs, plan).steps, jnp.swapaxes(d_final, 2, 3)
    )
    chunks = make_chunks(inputs, CHUNK, sizes)
    operands = chunk_operands(chunks, plan.scale)
    inverse = _chunk_first(matrices[:, :, :, 1]).astype(jnp.float32) if plan.delta else None
    residuals = Residuals(_chunk_first(states).swapaxes(3, 4), inverse)
    steps = StepGradients(
        chunk_output_gradient(d_out, inputs.segment_ids, CHUNK, jnp.bfloat16, sizes),
        _chunk_first(d_exits).swapaxes(3, 4),
        jnp.transpose(d_updates.reshape(plan.B, plan.n, CHUNK, plan.N, plan.V), (1, 0, 3, 2, 4)),
    )
    d_inputs = input_gradients(inputs, chunks, operands, residuals, steps, plan.scale, sizes)
    return d_inputs, jnp.swapaxes(d_initial, 2, 3)


def _chunk_first(x: jax.Array) -> jax.Array:
    """[B,N,n,...] -> [n,B,N,...]."""
    return jnp.moveaxis(x, 2, 0)


gpu_linear_attention.defvjp(_forward, _backward)
