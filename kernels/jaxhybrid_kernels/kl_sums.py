"""What KL(teacher || student) and its gradient need of the logits of both: largest logits, and sums of exponentials."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.gpu.kl_sums import kl_sums_kernel
from jaxhybrid_kernels.numerics import on_nvidia, split_axes


class KLSums(NamedTuple):
    """Of student's logits z and teacher's logits y, [N] each.

    KL = difference / teacher_total + log(total) + top - log(teacher_total) - teacher_top.
    """

    top: jax.Array  # the largest z
    total: jax.Array  # sum of exp(z - top)
    teacher_top: jax.Array
    teacher_total: jax.Array
    difference: jax.Array  # sum of exp(y - teacher_top) (y - z)


def kl_sums(logits_NS: jax.Array, teacher_NS: jax.Array, *, implementation: str | None = None) -> KLSums:
    """Sums over the columns of two arrays of logits, in their dtype. Not differentiable.

    implementation: "triton" (float32, on NVIDIA GPUs, both arrays read once; interpreted on a CPU), "xla", or None:
                    "triton" where it serves.

    Raises ValueError if "triton" is asked for by name and cannot.
    """
    refusal = _refusal(logits_NS, teacher_NS)
    if implementation == "triton" and refusal is not None:
        raise ValueError(refusal)
    if implementation == "triton" or (implementation is None and not refusal and on_nvidia()):
        return KLSums(*kl_sums_kernel(logits_NS, teacher_NS, interpret=not on_nvidia()))
    top, teacher_top = jnp.max(logits_NS, -1), jnp.max(teacher_NS, -1)
    weight = jnp.exp(teacher_NS - teacher_top[:, None])
    total = jnp.sum(jnp.exp(logits_NS - top[:, None]), -1)
    difference = jnp.sum(weight * (teacher_NS - logits_NS), -1)
    return KLSums(top, total, teacher_top, jnp.sum(weight, -1), difference)


def _refusal(logits: jax.Array, teacher: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, naming the value in the way; None if it can."""
    if axes := split_axes(logits, teacher):
        return f"implementation='triton' runs on whole arrays: they are split over {axes}."
    for name, array in (("logits", logits), ("teacher's logits", teacher)):
        if array.dtype != jnp.float32:
            return f"{name} have dtype {array.dtype}, implementation='triton' takes float32."
    return None
