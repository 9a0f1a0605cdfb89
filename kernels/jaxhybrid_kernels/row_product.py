"""The product of a few rows with a matrix as decoding wants it: norm before, gate, bias and residual after."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.read_on import BESIDE_PRODUCT
from jaxhybrid_kernels.gpu.row_product import GROUP, Blocks, row_product_kernel
from jaxhybrid_kernels.numerics import on_nvidia, split_axes

SHORT = Blocks(outputs=4, inputs=512, warps=1, read_on=BESIDE_PRODUCT)
LONG = Blocks(outputs=2, inputs=2048, warps=8, read_on=BESIDE_PRODUCT)
LONG_SUM = 4096  # inputs from which several warps share a sum


def row_product(
    x: jax.Array,
    weight_OD: jax.Array,
    bias_O: jax.Array | None = None,
    *,
    norm: tuple[jax.Array, float] | None = None,
    residual: jax.Array | None = None,
    gated: bool = False,
    dtype: Any = None,
    then: Sequence[jax.Array] = (),
    implementation: str | None = None,
) -> jax.Array:
    """x [...,D] by a matrix that has a row for each result: [...,O], summed in float32 (float64 if x is). Not
    differentiable: for decoding.

    norm:           (scale [D], eps): x is first divided by its root mean square and scaled, as Llama does.
    residual:       [...,O], added to the result.
    gated:          the first half of the results are gates of the second: silu(a) b, [...,O/2].
    dtype:          of the result; x's by default.
    then:           what the next kernel reads first: on Hopper and later "triton" has some of it in the cache by then.
    implementation: "triton" (one row in float32 or bfloat16, on NVIDIA GPUs; interpreted on a CPU), "xla", or None:
                    "triton" where it serves.

    Raises ValueError if "triton" is asked for by name and cannot.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    outputs, inputs = weight_OD.shape
    blocks = blocks_of(outputs, inputs, gated)
    refusal = _refusal(x, weight_OD, bias_O, residual, blocks)
    if implementation == "triton" and refusal is not None:
        raise ValueError(refusal)
    if blocks is not None and (implementation == "triton" or (implementation is None and not refusal and on_nvidia())):
        scale, eps = (None, 0.0) if norm is None else norm
        row, added = x.reshape(1, -1), None if residual is None else residual.reshape(1, -1)
        y = row_product_kernel(
            row, weight_OD, bias_O, scale, eps, added, gated, dtype, blocks,
            interpret=not on_nvidia(), then=then,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)
    if norm is not None:
        exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        exact = exact * lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + norm[1])
        x = exact.astype(x.dtype) * norm[0].astype(x.dtype)
    y = jnp.einsum("...d,od->...o", x, weight_OD, preferred_element_type=dtype)
    if bias_O is not None:
        y = y + bias_O.astype(dtype)
    if gated:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    return y if residual is None else residual + y


def blocks_of(outputs: int, inputs: int, gated: bool) -> Blocks | None:
    """What a program takes of such a matrix; None where a row is not whole groups of inputs."""
    if inputs % GROUP:
        return None
    blocks = SHORT if inputs < LONG_SUM else LONG
    return blocks._replace(outputs=math.gcd(outputs // (2 if gated else 1), blocks.outputs))


def _refusal(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, residual: jax.Array | None, blocks: Blocks | None
) -> str | None:
    """Why the kernel cannot take these arguments, naming the value in the way; None if it can."""
    if axes := split_axes(x, weight, bias, residual):
        return f"implementation='triton' runs on whole arrays: they are split over {axes}."
    if math.prod(x.shape[:-1]) != 1:
        return f"x has shape {tuple(x.shape)}, implementation='triton' takes one row."
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} has dtype {array.dtype}, implementation='triton' takes float32 and bfloat16."
    if blocks is None:
        return f"weight has shape {tuple(weight.shape)}: implementation='triton' wants {GROUP} to divide its columns."
    return None
