"""SwiGLU between products in float8: what two of them gave, made into the next one's input."""

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.gpu.float8_swiglu import float8_swiglu_kernel
from jaxhybrid_kernels.numerics import (
    FLOAT8,
    LARGEST_FLOAT8,
    SMALLEST_SCALED,
    gpu_capability,
    on_nvidia,
    split_axes,
)

OLDEST = 8.9  # compute capability that has float8
MOST = 2**31  # numbers: Triton counts their bytes with 32 bits


def float8_swiglu(
    gate_NF: jax.Array,
    up_NF: jax.Array,
    row_scale_N: jax.Array,
    gate_scale_F: jax.Array,
    up_scale_F: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """silu(g) u, with g = gate row_scale gate_scale and u = up row_scale up_scale in float32, as float8 values times a
    scale for each row: (values float8_e4m3fn [N,F], scale float32 [N]). The largest value of a row is 448. Not
    differentiable.

    gate, up:       sums of float8 products, of any type.
    row_scale:      of the rows that were multiplied, gate_scale and up_scale of the columns; float32.
    implementation: "triton" (on NVIDIA GPUs from compute capability 8.9 on; interpreted on a CPU), "xla", or None:
                    "triton" where it serves.

    Raises ValueError if "triton" is asked for by name and cannot.
    """
    refusal = _refusal(gate_NF, up_NF)
    if implementation == "triton" and refusal is not None:
        raise ValueError(refusal)
    if implementation == "triton" or (implementation is None and refusal is None and _has_float8()):
        arrays = gate_NF, up_NF, row_scale_N, gate_scale_F, up_scale_F
        values, scale = float8_swiglu_kernel(*arrays, interpret=not on_nvidia())
        return values, scale
    gate, up = (
        sums.astype(jnp.float32) * (row_scale_N[:, None] * columns)
        for sums, columns in ((gate_NF, gate_scale_F), (up_NF, up_scale_F))
    )
    hidden = jax.nn.silu(gate) * up
    scale = jnp.maximum(jnp.max(jnp.abs(hidden), axis=-1), SMALLEST_SCALED) / LARGEST_FLOAT8
    return (hidden / scale[:, None]).astype(FLOAT8), scale


def _refusal(gate_NF: jax.Array, up_NF: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, naming the value in the way; None if it can."""
    if axes := split_axes(gate_NF, up_NF):
        return f"implementation='triton' runs on whole arrays: they are split over {axes}."
    if gate_NF.size >= MOST:
        return f"gate has shape {tuple(gate_NF.shape)}, implementation='triton' takes fewer than {MOST} numbers."
    return None


def _has_float8() -> bool:
    return on_nvidia() and float(gpu_capability() or 0) >= OLDEST
