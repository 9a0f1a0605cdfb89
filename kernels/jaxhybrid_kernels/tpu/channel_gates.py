"""What a chunk contributes apart from the state, for one decay per key channel, in a kernel; forward and backward.

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

import math
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxhybrid_kernels.tpu.gates import HeadGates, across
from jaxhybrid_kernels.tpu.operands import Operands, StateGradients
from jaxhybrid_kernels.tpu.products import product, product_transposed
from jaxhybrid_kernels.tpu.turns import Chain

BLOCK = 8  # tokens in a register; runs inside a block are near
PACKED = 16  # tokens in a register of bfloat16: from runs of this size on, second runs are cut out


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
    meetings = np.stack([(i >> level) ^ (t >> level) == 1 for level in range(_levels(C))])
    i, t = i[: C // 2], t[:, : C // 2]

    def spans(level: int) -> np.ndarray:
        second = (i >> level) % 2 == 1
        return (i >> level == t >> level) & np.where(second, t <= i, t > i)

    same_block = i // BLOCK == t // BLOCK
    sums = np.concatenate([*map(spans, range(_levels(BLOCK))), same_block & (t <= i), same_block & (t > i)])
    gradients = np.concatenate([*map(spans, range(_levels(C // 2))), t <= i, t > i]).T
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
    level = sum(((i >> bit) != (j >> bit)).astype(jnp.int32) for bit in range(_levels(C)))
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
        self.queries = [x.astype(jnp.float32) for x in _pieces(q, C)]
        half, parts = C // 2, 2 * sums.shape[1] // C
        spans = [product(sums, _parts(x, parts)) for x in _pieces(log_decay * math.log2(math.e), half)]
        gates = [jnp.concatenate(both, axis=0) for both in zip(*(_pieces(jnp.exp2(x), half) for x in spans))]
        *self.near, self.since, self.until = gates
        blocks = _pieces(self.since, BLOCK)
        self.blocks = [jnp.broadcast_to(block[-1:], block.shape) for block in blocks]

    def gate(self, level: int) -> jax.Array:
        """[C,K]: what keys and queries are multiplied by where runs of a level meet."""
        size = 1 << level
        if size < BLOCK:
            return self.near[level]
        return _by_run(self.until_end(size), self.since_start(size), size)

    def since_start(self, size: int) -> jax.Array:
        """[C,K]: the decay from the start of each run of `size` through a token."""
        return self._through_blocks(self.since, size, 1)

    def until_end(self, size: int) -> jax.Array:
        """[C,K]: the decay after a token, to the end of its run."""
        return self._through_blocks(self.until, size, -1)

    def _through_blocks(self, gate: jax.Array, size: int, direction: int) -> jax.Array:
        """gate, of blocks, times the decay of whole blocks between them and the start (1) or the end (-1) of a run."""
        gates = _pieces(gate, BLOCK)
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


def channel_operands(head: ChannelHead, tokens: Tokens, scale: float, delta: bool) -> Chain[Operands]:
    C = head.k.shape[0]
    grams = [jnp.where(tokens.level == 0, _sum_lanes(q * head.k), 0) for q in head.queries]
    if delta:
        grams.append(jnp.zeros((C, C), jnp.float32))
    yield
    for level in range(_levels(C)):
        size, here = 1 << level, tokens.level == level + 1
        gate = head.gate(level)
        keys, late = head.k * gate, _late(gate, size)
        rows = [_late(q, size) * late for q in head.queries]
        if delta:
            rows.append(_late(keys, size))
        met = product_transposed(jnp.concatenate(rows, axis=0).astype(head.dtype), keys.astype(head.dtype))
        grams = [_choose(here, new, old, size) for new, old in zip(_pieces(met, rows[0].shape[0]), grams)]
        yield
    pair = scale * jnp.concatenate(grams[: len(head.queries)], axis=0)
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
        jnp.broadcast_to(carry, (BLOCK, carry.shape[1])).T[:, :1],
        pair,
        coupling,
    )


def keep_scores(operands: Operands, dtype: Any) -> jax.Array:
    """pair and coupling [R*C,C], for the backward: the transpose of coupling lies above the diagonal of the first pair."""
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


def channel_gradients(
    head: ChannelHead, tokens: Tokens, constants: Constants, gradients: StateGradients, scale: float
) -> Chain[tuple[jax.Array, jax.Array, jax.Array]]:
    """Gradients of q [R*C,K], k [C,K] and log_decay [C,K], float32.

    An exponent is a sum of decays, and its gradient is that of its gate times the gate: nothing cancels.
    """
    growing = _Gradients(head, tokens, gradients, scale)
    yield
    for level in range(_levels(head.k.shape[0])):
        growing.meet(level, constants.meetings[level])
        if 1 << level == BLOCK:
            yield
    yield
    return growing.finish(constants.sums_transposed[...])


class _Gradients:
    """Gradients of one head while they grow, level by level; names as in `ChannelHead`."""

    def __init__(self, head: ChannelHead, tokens: Tokens, gradients: StateGradients, scale: float):
        C = head.k.shape[0]
        self.head = head
        pairs = [jnp.where(tokens.level >= 0, scale * pair, 0) for pair in _pieces(gradients.pair, C)]
        diagonals = [_sum_lanes(jnp.where(tokens.level == 0, pair, 0)) for pair in pairs]
        self.through_states(tokens, gradients)
        self.queries = [old + diagonal * head.k for old, diagonal in zip(self.queries, diagonals)]
        self.k = self.k + sum(diagonal * q for diagonal, q in zip(diagonals, head.queries))
        self.exponents: list[jax.Array] = []  # [C,K] per level
        to_keys = jnp.zeros((C, C), jnp.float32)
        if gradients.coupling is not None:
            coupling = jnp.where(tokens.level > 0, gradients.coupling, 0)
            to_keys = coupling + coupling.T
        turned = [pair.T for pair in pairs]
        # Of runs inside halves, each half's keys and queries with the same: [(1+R)H,(1+R)H].
        self.near = [self._within(at, to_keys, pairs, turned) for at in (0, C // 2)]
        # Of longer runs: second runs' keys and queries with keys, first runs' keys with keys and queries.
        self.late = [self._bits(x) for x in (to_keys, *pairs)]
        self.early = self._bits(jnp.concatenate([to_keys, *turned], axis=1))

    def through_states(self, tokens: Tokens, gradients: StateGradients) -> None:
        """What came through the entry and exit states."""
        head = self.head
        C = head.k.shape[0]
        entry, leaving = head.state_gates(tokens)
        last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
        assert gradients.carry is not None
        d_carry = jnp.broadcast_to(gradients.carry, (gradients.carry.shape[0], BLOCK)).T[:1]
        self.queries = [entry * d_q_in for d_q_in in _pieces(gradients.q_in, C)]
        self.k = leaving * gradients.k_out
        self.leaving = head.k * self.k
        self.entry = jnp.where(last, d_carry, 0)
        for q, d_q in zip(head.queries, self.queries):
            self.entry = self.entry + q * d_q
        if gradients.k_in is not None:
            d_k_in = entry * gradients.k_in
            self.entry = self.entry + head.k * d_k_in
            self.k = self.k + d_k_in

    def finish(self, sums_transposed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.concatenate(self.queries, axis=0), self.k, self._spread(self.entry, self.leaving, sums_transposed)

    def _within(self, at: int, to_keys: jax.Array, pairs: list[jax.Array], turned: list[jax.Array]) -> jax.Array:
        half = to_keys.shape[0] // 2

        def cut(x):
            return x[at : at + half, at : at + half]

        nothing = [jnp.zeros((half, half), jnp.float32)] * len(pairs)
        rows = [[to_keys, *turned], *([pair] for pair in pairs)]
        rows = [list(map(cut, row)) for row in rows]
        rows[1:] = [row + nothing for row in rows[1:]]
        return self._bits(jnp.concatenate([jnp.concatenate(_turn(row, at), axis=1) for row in rows], axis=0))

    def _bits(self, x: jax.Array) -> jax.Array:
        return pltpu.bitcast(x.astype(self.head.dtype), jnp.int32)

    def _floats(self, x: jax.Array) -> jax.Array:
        return pltpu.bitcast(x, self.head.dtype)

    def meet(self, level: int, meetings: jax.Array) -> None:
        """meetings: a row of `Constants.meetings`."""
        head, size = self.head, 1 << level
        gate = head.gate(level)
        late = _late(gate, size)
        keys = (head.k * gate).astype(head.dtype)
        queries = [(_late(q, size) * late).astype(head.dtype) for q in head.queries]
        d_k, d_queries = (self._meet_near if size < PACKED else self._meet_far)(keys, queries, size, meetings)
        d_k, d_queries = gate * d_k, [late * d_q for d_q in d_queries]
        self.k = self.k + d_k
        self.queries = [_add_late(old, d_q, size) for old, d_q in zip(self.queries, d_queries)]
        exponent = head.k * d_k
        for q, d_q in zip(head.queries, d_queries):
            exponent = _add_late(exponent, _late(q, size) * d_q, size)
        self.exponents.append(exponent.astype(head.dtype))

    def _meet_near(
        self, keys: jax.Array, queries: list[jax.Array], size: int, meetings: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        half = keys.shape[0] // 2
        where = meetings[: meetings.shape[0] // 2] | meetings[meetings.shape[0] // 2 :]  # twice the same, side by side
        sides = 1 + len(queries)
        where = jnp.concatenate([where] * (-(-sides // 2)), axis=1)[:, : sides * half]
        where = jnp.concatenate([where] * sides, axis=0)
        found = []
        for at, matrix in zip((0, half), self.near):
            rows = jnp.concatenate(_turn([x[at : at + half] for x in (keys, *queries)], at), axis=0)
            found.append(_pieces(product(self._floats(matrix & where), rows), half))
        d_k, *d_queries = (jnp.concatenate(halves, axis=0) for halves in zip(*found))
        return d_k, d_queries

    def _meet_far(
        self, keys: jax.Array, queries: list[jax.Array], size: int, meetings: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        tokens_per_row = keys.shape[0] // meetings.shape[0]
        where = _late(meetings, size, tokens_per_row)
        late = jnp.concatenate([_late(bits, size, tokens_per_row) & where for bits in self.late], axis=0)
        d_late, *d_queries = _pieces(product(self._floats(late), keys), keys.shape[0] // 2)
        where = _early(meetings, size, tokens_per_row)
        early = _early(self.early, size, tokens_per_row) & jnp.concatenate([where] * len(self.late), axis=1)
        rows = jnp.concatenate([keys, *(_back_in_place(q, size) for q in queries)], axis=0)
        d_early = product(self._floats(early), rows)
        return _weave(d_early, d_late, size), d_queries

    def _spread(self, entry: jax.Array, leaving: jax.Array, sums_transposed: jax.Array) -> jax.Array:
        """The gradients of all exponents [C,K], to every decay that they hold.

        `entry` and `leaving` are those of sums from the chunk's start and to its end. The part of such a sum in its
        token's half is what the token has at the level where the halves meet; the other half is summed as a whole.
        """
        half = entry.shape[0] // 2
        *inside, across_halves = self.exponents
        since = jnp.concatenate([entry[:half], entry[half:] + across_halves[half:]], axis=0).astype(self.head.dtype)
        until = jnp.concatenate([leaving[:half] + across_halves[:half], leaving[half:]], axis=0).astype(self.head.dtype)
        whole = (jnp.sum(entry[half:], axis=0, keepdims=True), jnp.sum(leaving[:half], axis=0, keepdims=True))
        spread = []
        for at, other in zip((0, half), whole):
            exponents = jnp.concatenate([x[at : at + half] for x in (*inside, since, until)], axis=0)
            parts = _parts(exponents, sums_transposed.shape[1] // exponents.shape[0])
            spread.append(product(sums_transposed, parts) + other)
        return jnp.concatenate(spread, axis=0)


def _levels(C: int) -> int:
    return C.bit_length() - 1


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[M,K] float32 -> [count*M,K] bfloat16, the leading bits of x and of what the parts before left over."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return jnp.concatenate(parts, axis=0)


def _pieces(x: jax.Array, rows: int) -> list[jax.Array]:
    return [x[start : start + rows] for start in range(0, x.shape[0], rows)]


def _sum_lanes(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _by_run(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    """First runs of one [C,K], second runs of the other."""
    runs = zip(_pieces(first, size), _pieces(second, size))
    return jnp.concatenate([pair[at % 2] for at, pair in enumerate(runs)], axis=0)


def _late(x: jax.Array, size: int, tokens_per_row: int = 1) -> jax.Array:
    """Of rows for C tokens those of second runs if they can be cut out, else all."""
    if size < PACKED:
        return x
    return jnp.concatenate(_pieces(x, size // tokens_per_row)[1::2], axis=0)


def _early(x: jax.Array, size: int, tokens_per_row: int = 1) -> jax.Array:
    """The rows that `_late` cuts away."""
    return jnp.concatenate(_pieces(x, size // tokens_per_row)[0::2], axis=0)


def _weave(early: jax.Array, late: jax.Array, size: int) -> jax.Array:
    """Undoes `_early` and `_late`."""
    pairs = zip(_pieces(early, size), _pieces(late, size))
    return jnp.concatenate([piece for pair in pairs for piece in pair], axis=0)


def _turn(order: list[jax.Array], at: int) -> list[jax.Array]:
    """The second half's blocks backwards, so that its keys stay in the lanes that they have in the chunk."""
    return order[::-1] if at else order


def _back_in_place(late: jax.Array, size: int) -> jax.Array:
    """Undoes `_late`, with zeros for first runs."""
    if size < PACKED:
        return late
    zeros = jnp.zeros((size, late.shape[1]), late.dtype)
    return jnp.concatenate([piece for run in _pieces(late, size) for piece in (zeros, run)], axis=0)


def _add_late(x: jax.Array, late: jax.Array, size: int) -> jax.Array:
    """x + late, where late has the rows that `_late` takes."""
    if size < PACKED:
        return x + late
    runs = _pieces(x, size)
    runs[1::2] = [run + piece for run, piece in zip(runs[1::2], _pieces(late, size))]
    return jnp.concatenate(runs, axis=0)


def _choose(where: jax.Array, late: jax.Array, x: jax.Array, size: int) -> jax.Array:
    """late, with the rows that `_late` takes, where it is to be taken; else x. First runs take nothing."""
    if size < PACKED:
        return jnp.where(where, late, x)
    runs = _pieces(x, size)
    pieces = zip(_pieces(where, size)[1::2], _pieces(late, size), runs[1::2])
    runs[1::2] = [jnp.where(*piece) for piece in pieces]
    return jnp.concatenate(runs, axis=0)
