"""The arguments of `dplr_attention` and their checks: every refusal names the argument and its value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.debug import check_log_decay
from jaxhybrid_kernels.numerics import state_dtype, varying_zero
from jaxhybrid_kernels.validation import check_floating, check_shape, check_state

CHUNK_SIZES = (16, 32, 64, 128)


class Inputs(NamedTuple):
    """What `dplr_attention` takes per token. One token alone has no T axis and no segment_ids."""

    q: jax.Array  # [B,T,N,K]
    k: jax.Array
    v: jax.Array  # [B,T,N,V]
    log_decay: jax.Array  # [B,T,N,K]
    a: jax.Array
    b: jax.Array
    segment_ids: jax.Array | None = None  # [B,T]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[B,N,K,V]."""
        return (self.v.shape[0], *self.v.shape[-2:-1], self.k.shape[-1], self.v.shape[-1])


class Call(NamedTuple):
    """Checked arguments of one call, as the implementations get them."""

    inputs: Inputs
    initial_state: jax.Array | None
    scale: float
    chunk_size: int | None

    def varying(self) -> tuple[Inputs, jax.Array]:
        """The inputs and the state (zeros if none is given), along every manual mesh axis along which any varies."""
        inputs, given = self.inputs, self.initial_state
        dtype = state_dtype(*inputs[:6], given)
        state = jnp.zeros(inputs.state_shape, dtype) if given is None else given.astype(dtype)
        zero = varying_zero(*inputs, given)
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), (inputs, state))


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size={chunk_size!r} must be one of {', '.join(map(str, CHUNK_SIZES))}.")


def check_inputs(inputs: Inputs, axes: str, state_name: str, state: jax.Array | None) -> None:
    """Checks the inputs and the state against one another; axes names those of q: "batch, tokens, heads, width"."""
    for name, array in (("q", inputs.q), ("v", inputs.v)):
        if array.ndim != len(axes.split(",")) or 0 in array.shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected [{axes}], every axis at least 1.")
    tokens = inputs.v.shape[:-1]
    for name in ("q", "k", "log_decay", "a", "b"):
        check_shape(name, getattr(inputs, name), (*tokens, inputs.q.shape[-1]))
    check_shape("segment_ids", inputs.segment_ids, tokens[:-1])
    check_state(state_name, state, inputs.state_shape)
    check_floating(**inputs._replace(segment_ids=None)._asdict())
    if inputs.segment_ids is not None and not jnp.issubdtype(inputs.segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {inputs.segment_ids.dtype}, expected an integer dtype.")
    check_log_decay(inputs.log_decay, inputs.segment_ids)
