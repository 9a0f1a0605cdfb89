"""Starts a kernel: what all of them have in common, and manual mesh axes."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax


class Launched(Protocol):
    @property
    def interpret(self) -> bool: ...


def kernel(body: Callable[..., None], plan: Launched, out_type: Sequence[jax.ShapeDtypeStruct], **given: Any) -> Any:
    """A function of arrays that runs `body` on references to them, to its results and to scratch memory.

    Inside `jax.shard_map` the results vary along the mesh axes along which the first argument does. Layouts are all
    given by hand: inferring them takes minutes where elementwise steps are many.
    """

    def run(*operands: jax.Array) -> list[jax.Array]:
        varying = jax.typeof(operands[0]).manual_axis_type
        results = plgpu.kernel(
            body,
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in out_type],
            compiler_params=plgpu.CompilerParams(
                approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
            **given,
        )(*operands)
        unmarked_axes = tuple(varying.varying - jax.typeof(results[0]).manual_axis_type.varying)
        return lax.pcast(results, unmarked_axes, to="varying") if unmarked_axes else results

    return run


def unmarked(x: jax.Array) -> jax.Array:
    """x without its mark of varying along manual mesh axes; compiled to nothing.

    Arguments of a kernel carry such marks, what is computed in it does not, and a loop wants one type for what it
    carries.
    """
    return lax.select(x == x, x, x)
