"""Linear attention by the TPU kernels, with its custom gradient, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.numerics import state_dtype
from jaxhybrid_kernels.tpu.backward import tpu_backward
from jaxhybrid_kernels.tpu.forward import Residuals, tpu_forward
from jaxhybrid_kernels.tpu.layout import CHUNK, WIDTHS, Layout
from jaxhybrid_kernels.validation import Sizes


def tpu_refusal(inputs: Inputs, initial_state: jax.Array | None, chunk_size: int | None, sizes: Sizes) -> str | None:
    """Why the kernels cannot take these arguments, naming the argument and its value; None if they can."""
    for name, letter, width in (("k", "K", sizes.K), ("v", "V", sizes.V)):
        if width > WIDTHS[-1]:
            return f"{name} has {letter}={width} channels per head, pallas_tpu takes at most {WIDTHS[-1]}."
    for name, array in (*inputs._asdict().items(), ("initial_state", initial_state)):
        if array is not None and state_dtype(array) == jnp.float64:
            return f"{name} has dtype float64, pallas_tpu computes in float32."
    if chunk_size not in (None, CHUNK):
        return f"chunk_size={chunk_size!r}: pallas_tpu takes chunks of {CHUNK} tokens only."
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tpu_linear_attention(layout: Layout, inputs: Inputs, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `linear_attention`; initial_state [B,N,K,V] float32."""
    return tpu_forward(inputs, initial_state, layout, keep=False)[0]


def _forward(
    layout: Layout, inputs: Inputs, initial_state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[Inputs, Residuals]]:
    results, residuals = tpu_forward(inputs, initial_state, layout, keep=True)
    assert residuals is not None
    return results, (inputs, residuals)


def _backward(
    layout: Layout, kept: tuple[Inputs, Residuals], gradients: tuple[jax.Array, jax.Array]
) -> tuple[Inputs, jax.Array]:
    return tpu_backward(*kept, *gradients, layout)


tpu_linear_attention.defvjp(_forward, _backward)
