"""Linear attention in chunks by XLA, with its custom gradient."""

import jax

from jaxhybrid_kernels.call import Call
from jaxhybrid_kernels.chunk_layout import default_chunk_size
from jaxhybrid_kernels.chunked import chunked_forward
from jaxhybrid_kernels.chunked_backward import chunked_backward
from jaxhybrid_kernels.differentiable import differentiable
from jaxhybrid_kernels.numerics import target_platform, varying_alike

chunked_operator = differentiable(chunked_forward, chunked_backward)


def chunked_linear_attention(call: Call) -> tuple[jax.Array, jax.Array]:
    """(out, final state), see `linear_attention`."""
    call = call.normalized()
    inputs, state = varying_alike(call.inputs, call.state())
    per_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
    largest = 128 if target_platform() == "gpu" and not per_channel else 64
    C = call.chunk_size or default_chunk_size(call.sizes.T, largest)
    return chunked_operator((call.scale, C, call.sizes), inputs, state)
