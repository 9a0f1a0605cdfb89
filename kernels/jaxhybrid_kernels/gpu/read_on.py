"""Programs beside a kernel's own, which read what the next kernels will, so that it lies in the GPU's cache (L2) then.

A kernel that moves few bytes waits for memory and leaves its bandwidth to others: while one text's token is decoded,
the kernels between two products. Of what these programs read they make nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.numerics import gpu_capability

OLDEST = 9.0  # compute capability; of what came before some have a cache of a few megabytes
PIECE = 2**13  # bytes that a warp asks for
# Bytes in all. Beside a product, whose end alone leaves bandwidth, and beside what is between two products, where more
# takes longer than it saves.
BESIDE_PRODUCT, BETWEEN_PRODUCTS = 2**20, 12 * 2**20


class Pieces(NamedTuple):
    """The beginning of an array, a program for each piece."""

    array: jax.Array  # flat
    number: int
    elements: int


def pieces_of(arrays: Sequence[jax.Array], limit: int, warps: int) -> list[Pieces]:
    """Of the first `limit` bytes of arrays, which are needed in this order, for programs of so many warps; none where
    the cache may be small."""
    found, size = [], warps * PIECE
    left = limit if float(gpu_capability() or 0) >= OLDEST else 0
    for array in arrays:
        number = min(array.nbytes, left) // size
        if number:
            found.append(Pieces(array.reshape(-1), number, size // array.dtype.itemsize))
            left -= number * size
    return found


def programs(pieces: Sequence[Pieces]) -> int:
    return sum(each.number for each in pieces)


def run_or_read(
    run: Callable[[], None], is_own: Any, pieces: Sequence[Pieces], number: Any, refs: Sequence[Any], out_ref: Any
) -> None:
    """A kernel's body: `run` in its own programs, in the others piece `number` if there are so many.

    refs:           of the arrays.
    out_ref:        any result. Nothing is written to it by others; but what is read for nothing is not read.
    """
    if not pieces:
        run()
        return
    pl.when(is_own)(run)
    number, first = jnp.where(is_own, -1, number), 0
    for each, ref in zip(pieces, refs):

        @pl.when((number >= first) & (number < first + each.number))
        def _(each: Pieces = each, ref: Any = ref, first: int = first) -> None:
            read = plt.load(ref.at[pl.ds((number - first) * each.elements, each.elements)], volatile=True)
            nowhere = [jnp.zeros((each.elements,), jnp.int32)] * len(out_ref.shape)
            never = jnp.full((each.elements,), number < 0)
            plt.store(out_ref.at[*nowhere], read.astype(out_ref.dtype), mask=never)

        first += each.number
