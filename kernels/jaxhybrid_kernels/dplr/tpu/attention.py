"""`dplr_attention` by the TPU kernels, with its custom gradient, and what they refuse."""

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.differentiable import differentiable
from jaxhybrid_kernels.dplr.inputs import Call
from jaxhybrid_kernels.dplr.tpu.backward import tpu_backward
from jaxhybrid_kernels.dplr.tpu.forward import tpu_forward
from jaxhybrid_kernels.dplr.tpu.layout import CHUNK, WIDTHS, make_layout
from jaxhybrid_kernels.numerics import compute_dtype, state_dtype

tpu_operator = differentiable(tpu_forward, tpu_backward)


def tpu_refusal(call: Call) -> str | None:
    """Why the kernels cannot take these arguments, naming the argument and its value; None if they can."""
    inputs = call.inputs
    dtype = jnp.dtype(compute_dtype(inputs.q, inputs.k, inputs.v, inputs.a, inputs.b))
    most = WIDTHS[-1] if dtype == jnp.bfloat16 else WIDTHS[-2]  # more overflow the VMEM of a TPU v4
    for name, letter, array in (("q", "K", inputs.q), ("v", "V", inputs.v)):
        if array.shape[-1] > most:
            return (
                f"{name} has {letter}={array.shape[-1]} channels per head, pallas_tpu takes at most {most} in {dtype}."
            )
    for name, array in (*inputs._replace(segment_ids=None)._asdict().items(), ("initial_state", call.initial_state)):
        if array is not None and state_dtype(array) == jnp.float64:
            return f"{name} has dtype float64, pallas_tpu computes in float32."
    if call.chunk_size not in (None, CHUNK):
        return f"chunk_size={call.chunk_size!r}: pallas_tpu takes chunks of {CHUNK} tokens only."
    return None


def tpu_dplr(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `dplr_attention`."""
    inputs, state = call.varying()
    return tpu_operator(make_layout(inputs, call.scale), inputs, state)
