"""Dtypes, matrix products and varying axes shared by the operators."""

import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 16  # tokens of a sub-block: the unit of the triangular inverse and of the per-channel reference gates
LEAST_BETA = 2.0**-40  # far below what float32 adds to anything else
LOG2_E = math.log2(math.e)
NOTHING = -1e30  # score of what is not seen; finite, so that differences are
FLOAT8 = jnp.float8_e4m3fn
LARGEST_FLOAT8 = float(jnp.finfo(FLOAT8).max)
SMALLEST_SCALED = 1e-30  # that the largest of numbers scaled to float8 counts as, so that zeros can be divided, too
AMPERE, HOPPER = "8.0", "9.0"  # compute capabilities
HOPPER_NAMES = re.compile(r"NVIDIA G?H(20|100|200|800)\b")


def state_dtype(*arrays: jax.Array | None) -> Any:
    """Gates, sums and states: float32, or float64 when an argument is float64 (tests and studies)."""
    return jnp.float64 if any(a is not None and a.dtype == jnp.float64 for a in arrays) else jnp.float32


def compute_dtype(*arrays: jax.Array) -> Any:
    """Operands of the large products: bfloat16 when q, k and v all are, else the state's dtype."""
    return jnp.bfloat16 if all(a.dtype == jnp.bfloat16 for a in arrays) else state_dtype(*arrays)


def product(equation: str, a: jax.Array, b: jax.Array, precision: lax.Precision = lax.Precision.HIGHEST) -> jax.Array:
    """Einsum of two operands, summed in float32 (float64 if one is float64).

    Two bfloat16 operands lose no bits. Otherwise `precision` decides; by default no bits are lost either.
    """
    accumulate = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    both_short = a.dtype == jnp.bfloat16 and b.dtype == jnp.bfloat16
    return jnp.einsum(equation, a, b, preferred_element_type=accumulate, precision=None if both_short else precision)


def away_from_zero(beta: jax.Array) -> jax.Array:
    """beta with zeros, and what is nearly zero, taken for 2^-40: the Pallas kernels find its gradient from a sum that
    they divide by beta."""
    return jnp.where(lax.abs(beta) < LEAST_BETA, LEAST_BETA, beta)


def materialize(arrays: Any) -> Any:
    """Has these arrays written out as they are, out of reach of fusion with what makes and what uses them.

    XLA for GPUs otherwise merges a transposition into a chunk's last products and reductions, and reads whole matrices
    against their layout: on an H200 such fusions took a quarter of an alignment step.
    """
    return lax.optimization_barrier(arrays)


def varying_zero(*arrays: jax.Array | None) -> jax.Array:
    """A scalar zero that varies along every manual mesh axis (of `jax.shard_map`) along which any of the arrays does.

    Added to an array it changes nothing but that mark, which a scan demands of its carry from the start.
    """
    zero = jnp.zeros((), jnp.float32)
    for array in arrays:
        if array is not None:
            zero = zero + jnp.zeros_like(array[(0,) * array.ndim], dtype=jnp.float32)
    return zero


def varying_alike(inputs: Any, state: Any) -> Any:
    """(inputs, state), all varying along every manual mesh axis along which any of them does."""
    zero = varying_zero(*inputs, state)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), (inputs, state))


def split_axes(*arrays: jax.Array | None) -> list[str]:
    """Explicit mesh axes over which any of the arrays is split; none inside `jax.shard_map`, where axes are manual."""
    names = [axis for array in arrays if array is not None for axis in jax.typeof(array).sharding.spec]
    flat = [name for names_of in names for name in (names_of if isinstance(names_of, tuple) else (names_of,))]
    return sorted({name for name in flat if name is not None})


def target_platform() -> str:
    """The platform that code traced now will run on: that of the mesh in use, if it names one, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def recurs_by_kernels() -> bool:
    """Whether linear attention takes its own kernels where they serve: unless JAXHYBRID_LINEAR_KERNELS is 0."""
    return os.environ.get("JAXHYBRID_LINEAR_KERNELS") != "0"


def decodes_by_kernels() -> bool:
    """Whether decoding takes its own kernels where they serve: on GPUs of NVIDIA's, unless
    JAXHYBRID_DECODE_KERNELS is 0 (nowhere) or 1 (wherever they have a form)."""
    wanted = os.environ.get("JAXHYBRID_DECODE_KERNELS")
    return wanted == "1" or (wanted != "0" and on_nvidia())


def attends_by_kernels() -> bool:
    """Whether softmax attention takes its own kernels where they serve: unless JAXHYBRID_ATTENTION_KERNELS is 0."""
    return os.environ.get("JAXHYBRID_ATTENTION_KERNELS") != "0"


def on_nvidia() -> bool:
    """Whether code traced now will run on a GPU of NVIDIA's, from Ampere on: older ones have no Triton."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return target_platform() == "gpu" and "NVIDIA" in kind and float(gpu_capability() or AMPERE) >= float(AMPERE)


def gpu_capability() -> str:
    """Compute capability, as "9.0", of the GPU that code traced now will run on; of one that is not here its name tells
    whether it is Hopper, and any other's is ""."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if jax.default_backend() == "gpu" and (device is None or device.device_kind == jax.devices()[0].device_kind):
        return str(jax.devices()[0].compute_capability)
    return HOPPER if device is not None and HOPPER_NAMES.match(device.device_kind) else ""


def hopper_refusal(kernels: str) -> str | None:
    """Why kernels for Hopper GPUs, which CPUs interpret, cannot run where code traced now will; None if they can."""
    platform = target_platform()
    if platform not in ("gpu", "cpu"):
        return f"{kernels} runs on GPUs, and on CPUs interpreted; the platform is {platform!r}."
    if platform != "cpu" and (capability := gpu_capability()) != HOPPER:
        return f"{kernels} needs compute capability {HOPPER}; this GPU has {capability or 'an unknown one'}."
    return None
