"""What a chunk contributes apart from the state, for one decay per key channel, in a kernel.

    pair_ij = sum_c q_ic k_jc exp(G_ic - G_jc),   G the running sum of log_decay
cannot be split into exp(G_i) and exp(-G_j): the second overflows. It can be split around any moment between j and i.
Tokens i > j lie in neighbouring runs of s = 1, 2, 4, ... tokens, the second and the first of a pair, for exactly one s
(the highest bit in which i and j differ); they meet at the border between these runs:
    exp(G_i - G_j) = exp(sum from the border through i) exp(sum after j to the border),
with both exponents <= 0. At a level every token has one of the two roles, so one gate [C,K] serves rows and
columns, and the level is one matrix product under a mask.

Sums inside blocks of 8 tokens are products with a matrix of zeros and ones; longer runs multiply by the decays of whole
blocks. No sum ever holds a decay that its run does not, so a token that forgets takes no digits from its neighbours.
Heads are independent: their steps alternate, so that one hides the latency of another.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.numerics import LOG2_E
from jaxhybrid_kernels.tpu.gates import HeadGates, across
from jaxhybrid_kernels.tpu.operands import Operands
from jaxhybrid_kernels.tpu.products import product, product_transposed
from jaxhybrid_kernels.tpu.runs import BLOCK, PACKED, by_run, late_rows, level_count, pieces, rounded_parts, sum_lanes
from jaxhybrid_kernels.tpu.turns import Chain


class Constants(NamedTuple):
    """Operands of the kernel that depend on shapes alone."""

    # Of half a chunk, H tokens, which is all that they span, so that a product with them costs half as much:
    sums: Any  # [5H,parts*H] bfloat16: log_decay to its sums at the near levels, and since and until block ends
    sums_transposed: Any  # [H,parts*(levels+1)*H] bfloat16: gradients of all sums to that of log_decay
    meetings: Any  # [levels,C or C/2,C] int32: all bits of a float32, or of two bfloat16, set where pairs meet


class Tokens(NamedTuple):
    """What is known of a chunk's tokens, the same for all heads."""

    level: jax.Array  # [C,C] int32: 1 + the level at which i meets j, 0 if i = j; -1: i does not see j
    reads: jax.Array | None  # [C,LANES] float32: 1 if the token shares the entry state's segment; None: all do
    stays: jax.Array | None  # [C,LANES] float32: 1 if the token shares the last token's segment


def channel_constants(C: int, exact: bool) -> Constants:
    """`exact`: for float32 operands, where a sum's terms are split into three bfloat16 parts."""
    i, t = np.arange(C)[:, None], np.arange(C)[None]
    meetings = np.stack([(i >> level) ^ (t >> level) == 1 for level in range(level_count(C))])
    i, t = i[: C // 2], t[:, : C // 2]

    def spans(level: int) -> np.ndarray:
        second = (i >> level) % 2 == 1
        return (i >> level == t >> level) & np.where(second, t <= i, t > i)

    same_block = i // BLOCK == t // BLOCK
    sums = np.concatenate([*map(spans, range(level_count(BLOCK))), same_block & (t <= i), same_block & (t > i)])
    gradients = np.concatenate([*map(spans, range(level_count(C // 2))), t <= i, t > i]).T
    bits = -meetings.astype(np.int32)
    if not exact:
        bits = bits[:, 0::2] & 0xFFFF | bits[:, 1::2] << 16
    return Constants(
        np.tile(sums, (1, 3 if exact else 2)).astype(jnp.bfloat16),
        np.tile(gradients, (1, 3 if exact else 1)).astype(jnp.bfloat16),
        bits,
    )


def chunk_tokens(gates: HeadGates, C: int) -> Tokens:
    i, j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    level = sum(((i >> bit) != (j >> bit)).astype(jnp.int32) for bit in range(level_count(C)))
    sees = i >= j
    if gates.end_row is not None:
        sees = sees & (i.astype(jnp.float32) < gates.end_row)
    return Tokens(jnp.where(sees, level, -1), gates.entry, gates.exit)


class ChannelHead:
    """One head's queries and keys in float32, and their gates. q [R*C,K], k [C,K]; log_decay [C,K] float32."""

    def __init__(self, q: jax.Array, k: jax.Array, log_decay: jax.Array, constants: Constants):
        C, sums = k.shape[0], constants.sums[...]
        self.dtype = k.dtype
        self.k = k.astype(jnp.float32)
        self.queries = [x.astype(jnp.float32) for x in pieces(q, C)]
        half, parts = C // 2, 2 * sums.shape[1] // C
        spans = [product(sums, rounded_parts(x, parts)) for x in pieces(log_decay * LOG2_E, half)]
        gates = [jnp.concatenate(both, axis=0) for both in zip(*(pieces(jnp.exp2(x), half) for x in spans))]
        *self.near, self.since, self.until = gates
        blocks = pieces(self.since, BLOCK)
        self.blocks = [jnp.broadcast_to(block[-1:], block.shape) for block in blocks]

    def gate(self, level: int) -> jax.Array:
        """[C,K]: what keys and queries are multiplied by where runs of a level meet."""
        size = 1 << level
        if size < BLOCK:
            return self.near[level]
        return by_run(self.until_end(size), self.since_start(size), size)

    def since_start(self, size: int) -> jax.Array:
        """[C,K]: the decay from the start of each run of `size` through a token."""
        return self._through_blocks(self.since, size, 1)

    def until_end(self, size: int) -> jax.Array:
        """[C,K]: the decay after a token, to the end of its run."""
        return self._through_blocks(self.until, size, -1)

    def _through_blocks(self, gate: jax.Array, size: int, direction: int) -> jax.Array:
        """gate, of blocks, times the decay of whole blocks between them and the start (1) or the end (-1) of a run."""
        gates = pieces(gate, BLOCK)
        order = range(len(gates))[::direction]
        passed = None
        for before, at in pairwise(order):
            if before * BLOCK // size != at * BLOCK // size:
                passed = None
                continue
            passed = self.blocks[before] if passed is None else passed * self.blocks[before]
            gates[at] = gates[at] * passed
        return jnp.concatenate(gates, axis=0)

    def state_gates(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        """[C,K]: the decay since the entry state and until the exit state, 0 where a segment ends between."""
        C, width = self.k.shape
        entry, leaving = self.since_start(C), self.until_end(C)
        if tokens.reads is not None and tokens.stays is not None:
            entry, leaving = entry * across(tokens.reads, width), leaving * across(tokens.stays, width)
        return entry, leaving


def channel_operands(head: ChannelHead, tokens: Tokens, delta: bool) -> Chain[Operands]:
    C = head.k.shape[0]
    grams = [jnp.where(tokens.level == 0, sum_lanes(q * head.k), 0) for q in head.queries]
    if delta:
        grams.append(jnp.zeros((C, C), jnp.float32))
    yield
    for level in range(level_count(C)):
        size, here = 1 << level, tokens.level == level + 1
        gate = head.gate(level)
        keys, late = head.k * gate, late_rows(gate, size)
        rows = [late_rows(q, size) * late for q in head.queries]
        if delta:
            rows.append(late_rows(keys, size))
        met = product_transposed(jnp.concatenate(rows, axis=0).astype(head.dtype), keys.astype(head.dtype))
        grams = [_choose(here, new, old, size) for new, old in zip(pieces(met, rows[0].shape[0]), grams)]
        if size in (BLOCK, C // 2):
            yield
    pair = jnp.concatenate(grams[: len(head.queries)], axis=0)
    return _operands(head, tokens, pair, grams[-1] if delta else None)


def _operands(head: ChannelHead, tokens: Tokens, pair: jax.Array, coupling: jax.Array | None) -> Operands:
    entry, leaving = head.state_gates(tokens)
    carry = entry[-1:]
    return Operands(
        jnp.concatenate([q * entry for q in head.queries], axis=0).astype(head.dtype),
        (head.k * entry).astype(head.dtype),
        (head.k * leaving).astype(head.dtype),
        None,
        None,
        None,
        jnp.broadcast_to(carry, (BLOCK, carry.shape[1])).T[:, :1],
        pair,
        coupling,
    )


def keep_scores(operands: Operands, dtype: Any) -> jax.Array:
    """For the backward, [R*C,C]: pair, and above the diagonal of its first C rows the transpose of coupling."""
    scores = operands.pair
    if operands.coupling is not None:
        C = scores.shape[1]
        first = scores[:C] + operands.coupling.T
        scores = first if scores.shape[0] == C else jnp.concatenate([first, scores[C:]], axis=0)
    return scores.astype(dtype)


def kept_operands(head: ChannelHead, tokens: Tokens, scores: jax.Array, delta: bool) -> Operands:
    """Those of `channel_operands`, from what `keep_scores` made."""
    C = scores.shape[1]
    scores = scores.astype(jnp.float32)
    if not delta:
        return _operands(head, tokens, scores, None)
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    first = jnp.where(row >= column, scores[:C], 0)
    pair = first if scores.shape[0] == C else jnp.concatenate([first, scores[C:]], axis=0)
    return _operands(head, tokens, pair, jnp.where(row >= column, 0, scores[:C]).T)


def _choose(where: jax.Array, late: jax.Array, x: jax.Array, size: int) -> jax.Array:
    """late, with the rows that `late_rows` takes, where it is to be taken; else x. First runs take nothing."""
    if size < PACKED:
        return jnp.where(where, late, x)
    runs = pieces(x, size)
    both = zip(pieces(where, size)[1::2], pieces(late, size), runs[1::2])
    runs[1::2] = [jnp.where(*piece) for piece in both]
    return jnp.concatenate(runs, axis=0)
