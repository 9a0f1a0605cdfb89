"""Tokens of a chunk by runs of equal length: at every second one begins a pair's second run. Rows are tokens."""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 8  # tokens in a register
PACKED = 16  # tokens in a register of bfloat16: from runs of this size on, second runs are cut out


def level_count(C: int) -> int:
    return C.bit_length() - 1


def rounded_parts(x: jax.Array, count: int) -> jax.Array:
    """[M,K] float32 -> [count*M,K] bfloat16, the leading bits of x and of what the parts before left over.

    Rounded by their bits: XLA on a CPU drops a conversion to bfloat16 and back, and nothing would be left over.
    """
    parts = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32)
        high = lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return jnp.concatenate([*parts, x.astype(jnp.bfloat16)], axis=0)


def pieces(x: jax.Array, rows: int) -> list[jax.Array]:
    return [x[start : start + rows] for start in range(0, x.shape[0], rows)]


def by_run(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    """First runs of one [C,K], second runs of the other."""
    runs = zip(pieces(first, size), pieces(second, size))
    return jnp.concatenate([pair[at % 2] for at, pair in enumerate(runs)], axis=0)


def late_rows(x: jax.Array, size: int, tokens_per_row: int = 1) -> jax.Array:
    """Of rows for C tokens those of second runs if they can be cut out, else all."""
    if size < PACKED:
        return x
    return jnp.concatenate(pieces(x, size // tokens_per_row)[1::2], axis=0)


def early_rows(x: jax.Array, size: int, tokens_per_row: int = 1) -> jax.Array:
    """The rows that `late_rows` cuts away."""
    return jnp.concatenate(pieces(x, size // tokens_per_row)[0::2], axis=0)


def weave(early: jax.Array, late: jax.Array, size: int) -> jax.Array:
    """Undoes `early_rows` and `late_rows`."""
    pairs = zip(pieces(early, size), pieces(late, size))
    return jnp.concatenate([piece for pair in pairs for piece in pair], axis=0)


def back_in_place(late: jax.Array, size: int) -> jax.Array:
    """Undoes `late_rows`, with zeros for first runs."""
    if size < PACKED:
        return late
    zeros = jnp.zeros((size, late.shape[1]), late.dtype)
    return jnp.concatenate([piece for run in pieces(late, size) for piece in (zeros, run)], axis=0)


def add_late(x: jax.Array, late: jax.Array, size: int) -> jax.Array:
    """x + late, where late has the rows that `late_rows` takes."""
    if size < PACKED:
        return x + late
    runs = pieces(x, size)
    runs[1::2] = [run + piece for run, piece in zip(runs[1::2], pieces(late, size))]
    return jnp.concatenate(runs, axis=0)


def sum_lanes(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)
