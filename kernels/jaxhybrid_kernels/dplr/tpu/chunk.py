"""What a chunk of one group of heads contributes apart from the state, as values in a kernel; letters as in
dplr/operands.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.dplr.tpu.lanes import Lanes
from jaxhybrid_kernels.dplr.tpu.layout import CHUNK, Layout
from jaxhybrid_kernels.dplr.tpu.levels import (
    Gates,
    Tokens,
    make_gates,
    meeting_levels,
    move_down,
    move_up,
    run_sums,
    triangles,
)
from jaxhybrid_kernels.tpu.turns import Chain, abreast


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
    """`run_sums` and `meeting_levels`; the sums are repeated for each of the numbers that a float32 is split into."""

    sums: Any  # bfloat16 [(levels + 1) C,parts C]
    decays: Any  # bfloat16 [C,parts (levels + 1) C]: the transpose
    meeting: Any  # int32 [2C,2C]


class Chunk(NamedTuple):
    """Of one group of heads."""

    lanes: Lanes
    tokens: Tokens
    gates: Gates  # those with the states zero where the segment changes
    v: jax.Array  # [C,heads*V] compute dtype
    from_entry: jax.Array  # [2C,W] compute dtype: q_in above a_in
    to_exit: jax.Array  # [2C,W]: k_out above b_out
    carry: jax.Array  # [1,W] float32
    triangles: list[jax.Array]  # of each head, [2C,2C] float32: rows q and a, columns k and b in the head's order
    same: jax.Array | None  # [2C,2C] float32, 1 where row and column share a segment


def constants(exact: bool) -> Constants:
    matrices = np.concatenate(run_sums(CHUNK)).astype(np.float32)
    # In bfloat16 the exponents need 16 bits, their gradients 8.
    repeated = np.tile(matrices, (1, 3 if exact else 2)), np.tile(matrices.T, (1, 3 if exact else 1))
    sums, decays = (jnp.asarray(x, jnp.bfloat16) for x in repeated)
    return Constants(sums, decays, jnp.asarray(meeting_levels(CHUNK)))


def read_pair(arrays: Arrays, known: Constants, pair: int, layout: Layout) -> Chain[list[Chunk]]:
    """The chunk of the pair of heads with that number in a grid step's blocks: of one group or of two."""
    groups = (Lanes(layout.group, first, layout.dtype) for first in range(2 * pair, 2 * pair + 2, layout.group))
    return (yield from abreast([_read_group(arrays, known, lanes, layout) for lanes in groups]))


def _read_group(arrays: Arrays, known: Constants, lanes: Lanes, layout: Layout) -> Chain[Chunk]:

    def read(ref: Any, width: int) -> jax.Array:
        return ref[0, :, lanes.of_block(width)]

    q, k, a, b = (read(x, layout.K).astype(jnp.float32) for x in (arrays.q, arrays.k, arrays.a, arrays.b))
    tokens = Tokens(layout.scale * q, move_up(a), k, b)
    gates = make_gates(known.sums[...], read(arrays.log_decay, layout.K))
    yield
    lower = yield from triangles(tokens, gates.levels, known.meeting[...], lanes)
    lower = [jnp.concatenate([x[:CHUNK], move_down(x[CHUNK:])], axis=0) for x in lower]
    same = None
    if arrays.segments is not None:
        marks = arrays.segments[0]
        lane = lax.broadcasted_iota(jnp.int32, marks.shape, 1)
        pairs = jnp.where(lane < CHUNK, marks, jnp.roll(marks, CHUNK, axis=1))
        same = jnp.concatenate([pairs, pairs], axis=0)
        lower = [same * x for x in lower]
        entry, leaving = marks[:, CHUNK : CHUNK + 1], marks[:, CHUNK + 1 : CHUNK + 2]
        gates = Gates(gates.levels, gates.through * entry, gates.before * entry, gates.after * leaving)
    return Chunk(
        lanes,
        tokens,
        gates,
        read(arrays.v, layout.V),
        jnp.concatenate([tokens.q * gates.through, a * gates.before], axis=0).astype(layout.dtype),
        jnp.concatenate([k * gates.after, b * gates.after], axis=0).astype(layout.dtype),
        gates.through[CHUNK - 1 :],
        lower,
        same,
    )
