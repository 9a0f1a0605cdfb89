"""What a chunk of one group of heads contributes apart from the state, as values in a kernel; letters as in
dplr/operands.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.dplr.tpu.lanes import Lanes
from jaxhybrid_kernels.dplr.tpu.layout import CHUNK, Layout
from jaxhybrid_kernels.dplr.tpu.levels import AFTER, BEFORE, THROUGH, Tokens, gates, meeting_levels, run_sums, triangles


class Arrays(NamedTuple):
    """What the kernels read, laid out (see layout.py)."""

    q: Any  # [B,T,N*K]
    k: Any
    v: Any  # [B,T,N*V]
    log_decay: Any  # [B,T,N*K] float32
    a: Any
    b: Any
    segments: Any  # [B,T,2*CHUNK] or None


class Constants(NamedTuple):
    sums: Any  # bfloat16 [(levels + 3) C,3C]
    meeting: Any  # int32 [2C,2C]


class Chunk(NamedTuple):
    """Of one group of heads."""

    tokens: Tokens
    gates: list[jax.Array]  # [C,W] float32, one for each matrix of run_sums, zero where the segment changes
    v: jax.Array  # [C,heads*V] compute dtype
    from_entry: jax.Array  # [2C,W] compute dtype: q_in above a_in
    to_exit: jax.Array  # [2C,W]: k_out above b_out
    carry: jax.Array  # [1,W] float32
    triangles: list[jax.Array]  # of each head, [2C,2C] float32: rows q and a, columns k and b in the head's order
    same: jax.Array | None  # [2C,2C] float32, 1 where row and column share a segment


def constants() -> Constants:
    sums = np.concatenate(run_sums(CHUNK))
    return Constants(jnp.asarray(np.tile(sums, (1, 3)), jnp.bfloat16), jnp.asarray(meeting_levels(CHUNK)))


def read_group(arrays: Arrays, known: Constants, group: int, layout: Layout) -> tuple[Lanes, Chunk]:
    """The chunk of the group with that number in a grid step's blocks; known: references to the constants."""
    lanes = Lanes(layout.group, group * layout.group, layout.dtype)

    def read(ref: Any, width: int) -> jax.Array:
        width *= layout.group
        return ref[0, :, group * width : (group + 1) * width]

    q, k, a, b = (read(x, layout.K).astype(jnp.float32) for x in (arrays.q, arrays.k, arrays.a, arrays.b))
    tokens = Tokens(layout.scale * q, move_up(a), k, b)
    gated = gates(known.sums[...], read(arrays.log_decay, layout.K))
    lower = triangles(tokens, gated, known.meeting[...], lanes)
    lower = [jnp.concatenate([x[:CHUNK], move_down(x[CHUNK:])], axis=0) for x in lower]
    same = None
    if arrays.segments is not None:
        marks = arrays.segments[0]
        lane = lax.broadcasted_iota(jnp.int32, marks.shape, 1)
        pairs = jnp.where(lane < CHUNK, marks, jnp.roll(marks, CHUNK, axis=1))
        same = jnp.concatenate([pairs, pairs], axis=0)
        lower = [same * x for x in lower]
        entry, leaving = marks[:, CHUNK : CHUNK + 1], marks[:, CHUNK + 1 : CHUNK + 2]
        gated[THROUGH], gated[BEFORE], gated[AFTER] = (
            gated[THROUGH] * entry,
            gated[BEFORE] * entry,
            gated[AFTER] * leaving,
        )
    return lanes, Chunk(
        tokens,
        gated,
        read(arrays.v, layout.V),
        jnp.concatenate([tokens.q * gated[THROUGH], a * gated[BEFORE]], axis=0).astype(layout.dtype),
        jnp.concatenate([k * gated[AFTER], b * gated[AFTER]], axis=0).astype(layout.dtype),
        gated[THROUGH][CHUNK - 1 :],
        lower,
        same,
    )


def move_up(x: jax.Array) -> jax.Array:
    """Every row to the one above, the first to the last."""
    return jnp.roll(x, -1, axis=0)


def move_down(x: jax.Array) -> jax.Array:
    return jnp.roll(x, 1, axis=0)
