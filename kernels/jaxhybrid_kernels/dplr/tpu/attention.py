"""`dplr_attention` by the TPU kernels, with its custom gradient, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.dplr.inputs import Inputs
from jaxhybrid_kernels.dplr.tpu.backward import tpu_backward
from jaxhybrid_kernels.dplr.tpu.forward import Residuals, tpu_forward
from jaxhybrid_kernels.dplr.tpu.layout import CHUNK, WIDTHS, Layout
from jaxhybrid_kernels.numerics import compute_dtype, state_dtype


def tpu_refusal(inputs: Inputs, initial_state: jax.Array | None, chunk_size: int | None) -> str | None:
    """Why the kernels cannot take these arguments, naming the argument and its value; None if they can."""
    dtype = jnp.dtype(compute_dtype(inputs.q, inputs.k, inputs.v, inputs.a, inputs.b))
    most = WIDTHS[-1] if dtype == jnp.bfloat16 else WIDTHS[-2]  # more overflow the VMEM of a TPU v4
    for name, letter, array in (("q", "K", inputs.q), ("v", "V", inputs.v)):
        if array.shape[-1] > most:
            return (
                f"{name} has {letter}={array.shape[-1]} channels per head, pallas_tpu takes at most {most} in {dtype}."
            )
    for name, array in (*inputs._replace(segment_ids=None)._asdict().items(), ("initial_state", initial_state)):
        if array is not None and state_dtype(array) == jnp.float64:
            return f"{name} has dtype float64, pallas_tpu computes in float32."
    if chunk_size not in (None, CHUNK):
        return f"chunk_size={chunk_size!r}: pallas_tpu takes chunks of {CHUNK} tokens only."
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tpu_dplr(layout: Layout, inputs: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `dplr_attention`; state [B,N,K,V] float32."""
    return tpu_forward(inputs, state, layout, keep=False)[0]


def _forward(
    layout: Layout, inputs: Inputs, state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, Residuals]]:
    results, residuals = tpu_forward(inputs, state, layout, keep=True)
    assert residuals is not None
    return results, (inputs, residuals)


def _backward(
    layout: Layout, kept: tuple[Inputs, Residuals], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array]:
    return tpu_backward(*kept, *gradients, layout)


tpu_dplr.defvjp(_forward, _backward)
