"""Gradients of queries, keys and decays per channel in a kernel, from those of a chunk's operands."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxhybrid_kernels.tpu.channel_gates import ChannelHead, Constants, Tokens
from jaxhybrid_kernels.tpu.operands import StateGradients
from jaxhybrid_kernels.tpu.products import product
from jaxhybrid_kernels.tpu.runs import (
    BLOCK,
    PACKED,
    add_late,
    back_in_place,
    early_rows,
    late_rows,
    level_count,
    pieces,
    rounded_parts,
    sum_lanes,
    weave,
)
from jaxhybrid_kernels.tpu.turns import Chain


def channel_gradients(
    head: ChannelHead, tokens: Tokens, constants: Constants, gradients: StateGradients, scale: float
) -> Chain[tuple[jax.Array, jax.Array, jax.Array]]:
    """Gradients of q [R*C,K], k [C,K] and log_decay [C,K], float32.

    An exponent is a sum of decays, and its gradient is that of its gate times the gate: nothing cancels.
    """
    growing = _Gradients(head, tokens, gradients, scale)
    yield
    for level in range(level_count(head.k.shape[0])):
        growing.meet(level, constants.meetings[level])
        if 1 << level == BLOCK:
            yield
    yield
    return growing.finish(constants.sums_transposed[...])


class _Gradients:
    """Gradients of one head while they grow, level by level; names as in `ChannelHead`.

    `exponents` [C,K] are those of the levels' gates, `entry` and `leaving` those of the gates of states. They are sums
    of terms that are multiplied by zeros and ones next, rounded to the compute dtype once.
    """

    def __init__(self, head: ChannelHead, tokens: Tokens, gradients: StateGradients, scale: float):
        C = head.k.shape[0]
        self.head = head
        pairs = [jnp.where(tokens.level >= 0, scale * pair, 0) for pair in pieces(gradients.pair, C)]
        diagonals = [sum_lanes(jnp.where(tokens.level == 0, pair, 0)) for pair in pairs]
        self.queries, self.k = self._through_states(tokens, gradients)
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

    def _through_states(self, tokens: Tokens, gradients: StateGradients) -> tuple[list[jax.Array], jax.Array]:
        """What queries and keys get through the entry and exit states."""
        head = self.head
        C = head.k.shape[0]
        entry, leaving = head.state_gates(tokens)
        last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
        assert gradients.carry is not None
        d_carry = jnp.broadcast_to(gradients.carry, (gradients.carry.shape[0], BLOCK)).T[:1]
        d_queries = [entry * d_q_in for d_q_in in pieces(gradients.q_in, C)]
        d_k = leaving * gradients.k_out
        self.leaving = head.k * d_k
        self.entry = jnp.where(last, d_carry, 0)
        for q, d_q in zip(head.queries, d_queries):
            self.entry = self.entry + q * d_q
        if gradients.k_in is not None:
            d_k_in = entry * gradients.k_in
            self.entry = self.entry + head.k * d_k_in
            d_k = d_k + d_k_in
        return d_queries, d_k

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
        late = late_rows(gate, size)
        keys = (head.k * gate).astype(head.dtype)
        queries = [(late_rows(q, size) * late).astype(head.dtype) for q in head.queries]
        d_k, d_queries = (self._meet_near if size < PACKED else self._meet_far)(keys, queries, size, meetings)
        d_k, d_queries = gate * d_k, [late * d_q for d_q in d_queries]
        self.k = self.k + d_k
        self.queries = [add_late(old, d_q, size) for old, d_q in zip(self.queries, d_queries)]
        exponent = head.k * d_k
        for q, d_q in zip(head.queries, d_queries):
            exponent = add_late(exponent, late_rows(q, size) * d_q, size)
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
            found.append(pieces(product(self._floats(matrix & where), rows), half))
        d_k, *d_queries = (jnp.concatenate(halves, axis=0) for halves in zip(*found))
        return d_k, d_queries

    def _meet_far(
        self, keys: jax.Array, queries: list[jax.Array], size: int, meetings: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        tokens_per_row = keys.shape[0] // meetings.shape[0]
        where = late_rows(meetings, size, tokens_per_row)
        late = jnp.concatenate([late_rows(bits, size, tokens_per_row) & where for bits in self.late], axis=0)
        d_late, *d_queries = pieces(product(self._floats(late), keys), keys.shape[0] // 2)
        where = early_rows(meetings, size, tokens_per_row)
        early = early_rows(self.early, size, tokens_per_row) & jnp.concatenate([where] * len(self.late), axis=1)
        rows = jnp.concatenate([keys, *(back_in_place(q, size) for q in queries)], axis=0)
        d_early = product(self._floats(early), rows)
        return weave(d_early, d_late, size), d_queries

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
            parts = rounded_parts(exponents, sums_transposed.shape[1] // exponents.shape[0])
            spread.append(product(sums_transposed, parts) + other)
        return jnp.concatenate(spread, axis=0)


def _turn(order: list[jax.Array], at: int) -> list[jax.Array]:
    """The second half's blocks backwards, so that its keys stay in the lanes that they have in the chunk."""
    return order[::-1] if at else order
