"""Values of a head that wait in VMEM while other heads take their turns.

Many heads in one block of code hold far more values than there are registers, and the compiler spills. What is stored
here and read where it is used takes the same instructions, but no register in between. The compiler drops a store that
it sees being read, and holds the value; it cannot where the index is known only at run time.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl


def unknown_zero(axis: int) -> jax.Array:
    """Zero, made of the grid index along the axis so that the compiler cannot tell."""
    return pl.program_id(axis) // pl.num_programs(axis)


def set_aside(ref: Any, value: jax.Array, zero: jax.Array) -> Any:
    """Stores value in ref [1,*its shape] and gives what to read it from, a reference of its shape."""
    ref[0] = value.astype(ref.dtype)
    return ref.at[zero]
