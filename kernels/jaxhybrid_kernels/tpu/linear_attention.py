"""Linear attention by the TPU kernels, with its custom gradient, and what they refuse."""

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.call import Call
from jaxhybrid_kernels.differentiable import differentiable
from jaxhybrid_kernels.numerics import state_dtype, varying_alike
from jaxhybrid_kernels.tpu.backward import tpu_backward
from jaxhybrid_kernels.tpu.forward import tpu_forward
from jaxhybrid_kernels.tpu.layout import CHUNK, WIDTHS, make_layout

tpu_operator = differentiable(tpu_forward, tpu_backward)


def tpu_refusal(call: Call) -> str | None:
    """Why the kernels cannot take these arguments, naming the argument and its value; None if they can."""
    if (reason := call.split_refusal("pallas_tpu")) is not None:
        return reason
    for name, letter, width in (("k", "K", call.sizes.K), ("v", "V", call.sizes.V)):
        if width > WIDTHS[-1]:
            return f"{name} has {letter}={width} channels per head, pallas_tpu takes at most {WIDTHS[-1]}."
    for name, array in (*call.inputs._asdict().items(), ("initial_state", call.initial_state)):
        if array is not None and state_dtype(array) == jnp.float64:
            return f"{name} has dtype float64, pallas_tpu computes in float32."
    if call.chunk_size not in (None, CHUNK):
        return f"chunk_size={call.chunk_size!r}: pallas_tpu takes chunks of {CHUNK} tokens only."
    return None


def tpu_linear_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `linear_attention`. The kernels of the delta rules make norms themselves."""
    if call.inputs.beta is None:
        call = call.normalized()
    inputs, state = varying_alike(call.inputs, call.state())
    return tpu_operator(make_layout(inputs, call.scale, call.sizes, call.norm_eps), inputs, state)
