"""The four triangles of a chunk and their gradients inside a kernel, with decays per channel; see dplr/operands.py.

The rows are q and a, the columns k and b, each [C,W]. At the level of runs of s = 1, 2, 4, ... tokens every token is in
a first run (a column) or in a second one (a row), so one gate per token and level serves: the decay from the border
between the two runs through a row, or from behind a column to the border. A level is one product of gated rows with
gated columns, of which the blocks where that level's runs meet are kept. Runs of whole sublanes are taken apart, so
that only second runs are rows; shorter ones are not. Level -1 is the diagonal: no decay lies between row and column.

a reads the state before its own token: it is moved up by one token, as if it read the state after the token before, and
its triangles are moved back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhybrid_kernels.dplr.tpu.lanes import Lanes
from jaxhybrid_kernels.tpu.products import product, product_transposed
from jaxhybrid_kernels.tpu.turns import Chain

SUBLANES = 8


class Tokens(NamedTuple):
    """Float32 [C,W], the heads of a group side by side. q is scaled, a moved up by one token."""

    q: jax.Array
    a_up: jax.Array
    k: jax.Array
    b: jax.Array


class Gates(NamedTuple):
    """Float32 [C,W]."""

    levels: list[jax.Array]
    through: jax.Array  # decay from the chunk's start through the token
    before: jax.Array  # until the token
    after: jax.Array  # from behind the token to the chunk's end


def level_count(C: int) -> int:
    return C.bit_length() - 1


def run_sums(C: int) -> np.ndarray:
    """0/1 [levels + 1, C, C]: which decays are summed for each token's gate at each level but 0, where it is its
    own, and from the chunk's start through the token, and after it."""
    i, j = np.indices((C, C))
    sums = []
    for level in range(1, level_count(C)):
        second = (i >> level) & 1 == 1
        sums.append((i >> level == j >> level) & np.where(second, j <= i, j > i))
    return np.stack([*sums, j <= i, j > i])


def meeting_levels(C: int) -> np.ndarray:
    """int32 [2C,2C] by rows (q, a_up) and columns: the level at which they meet, -1 on the diagonal, else -2."""
    i, j = np.indices((C, C))
    level = np.where(i > j, np.log2(np.maximum(i ^ j, 1)).astype(np.int32), -2)
    return np.tile(np.where(i == j, -1, level), (2, 2)).astype(np.int32)


def make_gates(sums: jax.Array, log_decay: jax.Array) -> Gates:
    """Gates of log_decay [C,W]; sums: see `Constants`."""
    C = log_decay.shape[0]
    exponential = jnp.exp(product(sums, _parts(log_decay, sums.shape[1] // C)))
    *levels, through, after = (exponential[i : i + C] for i in range(0, sums.shape[0], C))
    return Gates([jnp.exp(log_decay), *levels], through, move_down(through, 1.0), after)


def triangles(tokens: Tokens, gates: list[jax.Array], meeting: jax.Array, lanes: Lanes) -> Chain[list[jax.Array]]:
    """For each head of the group [2C,2C] float32: rows q and a_up, columns k and b in the order of `Lanes.stack`."""
    C = tokens.k.shape[0]
    top = level_count(C) - 1
    result = [jnp.zeros((2 * C, 2 * C), jnp.float32)] * lanes.heads
    for level in range(top, -2, -1):
        places = _twice(_row_places(level, C), C)
        gated = _gated(tokens, gates, level)
        rows = _take(jnp.concatenate([gated.q, gated.a_up], axis=0), places).astype(lanes.dtype)
        met = _take(meeting, places) == level
        for head in range(lanes.heads):
            pairs = product_transposed(rows, _columns(gated, head, lanes))
            if level < top:  # at the top there is nothing below the first pair of runs
                pairs = jnp.where(met, pairs, _take(result[head], places))
            result[head] = _put(result[head], places, pairs)
        yield
    return result


def triangle_gradients(
    tokens: Tokens, gates: list[jax.Array], meeting: jax.Array, d_triangles: list[jax.Array], lanes: Lanes
) -> Chain[tuple[Tokens, list[jax.Array]]]:
    """Gradients of the tokens and, for each level, of the exponents of its gates, from those of `triangles`."""
    C = tokens.k.shape[0]
    top = level_count(C) - 1
    transposed = [x.T for x in d_triangles]
    meeting_transposed = meeting.T
    total = Tokens(*[jnp.zeros_like(tokens.k)] * 4)
    exponents = []
    for level in range(-1, top + 1):
        row_places, column_places = _row_places(level, C), _column_places(level, C)
        gated = _gated(tokens, gates, level)
        rows = jnp.concatenate([gated.q, gated.a_up], axis=0).astype(lanes.dtype)
        d_rows, d_columns = [], []
        for head in range(lanes.heads):
            by_row = _met(d_triangles[head], meeting, level, _twice(row_places, C), level < top)
            by_column = _met(transposed[head], meeting_transposed, level, _twice(column_places, C), level < top)
            d_rows.append(product(by_row.astype(lanes.dtype), _columns(gated, head, lanes)))
            of_head = product(by_column.astype(lanes.dtype), lanes.own(rows, head))
            d_columns.append(jnp.concatenate(lanes.unstack(of_head, head), axis=0))
        half = d_rows[0].shape[0] // 2
        d_row, d_column = _sum(d_rows), _sum(d_columns)
        changes = [
            (row_places, d_row[:half]),
            (row_places, d_row[half:]),
            (column_places, d_column[:half]),
            (column_places, d_column[half:]),
        ]
        if level >= 0:
            # Columns of level 0 have no decay behind them.
            changes = [
                (places, d if level == 0 and i > 1 else _take(gates[level], places) * d)
                for i, (places, d) in enumerate(changes)
            ]
            by_token = [_take(x, places) * d for x, (places, d) in zip(tokens, changes)]
            exponent = _add(jnp.zeros_like(tokens.k), row_places, by_token[0] + by_token[1])
            exponents.append(exponent if level == 0 else _add(exponent, column_places, by_token[2] + by_token[3]))
        total = Tokens(*(_add(x, places, d) for x, (places, d) in zip(total, changes)))
        yield
    return total, exponents


def decay_gradient(decays: jax.Array, exponents: list[jax.Array]) -> jax.Array:
    """The gradient of log_decay [C,W] from those of the exponents: of all levels, through and after; decays: see
    `Constants`."""
    own, *summed = exponents
    stacked = jnp.concatenate(summed, axis=0)
    return own + product(decays, _parts(stacked, decays.shape[1] // stacked.shape[0]))


def _row_places(level: int, C: int) -> list[slice]:
    """Where the rows of a level are: its second runs, or anywhere if they are shorter than the sublanes."""
    size = 1 << max(level, 0)
    return [slice(0, C)] if size < SUBLANES else [slice(i, i + size) for i in range(size, C, 2 * size)]


def _column_places(level: int, C: int) -> list[slice]:
    size = 1 << max(level, 0)
    return [slice(0, C)] if size < SUBLANES else [slice(i, i + size) for i in range(0, C, 2 * size)]


def _twice(places: list[slice], C: int) -> list[slice]:
    """The same places in two arrays one above the other."""
    return places + [slice(place.start + C, place.stop + C) for place in places]


def _gated(tokens: Tokens, gates: list[jax.Array], level: int) -> Tokens:
    """Rows and columns of a level times its gates; zero where `_row_places` and `_column_places` leave them out."""
    if level < 0:
        return tokens
    C = tokens.k.shape[0]

    def gate(x: jax.Array, places: list[slice]) -> jax.Array:
        return _add(jnp.zeros_like(x), places, _take(x, places) * _take(gates[level], places))

    rows, columns = _row_places(level, C), _column_places(level, C)
    k, b = (tokens.k, tokens.b) if level == 0 else (gate(tokens.k, columns), gate(tokens.b, columns))
    return Tokens(gate(tokens.q, rows), gate(tokens.a_up, rows), k, b)


def _columns(tokens: Tokens, head: int, lanes: Lanes) -> jax.Array:
    return lanes.stack(lanes.own(tokens.k, head), lanes.own(tokens.b, head), head).astype(lanes.dtype)


def _met(x: jax.Array, meeting: jax.Array, level: int, places: list[slice], mask: bool) -> jax.Array:
    taken = _take(x, places)
    return jnp.where(_take(meeting, places) == level, taken, 0) if mask else taken


def _take(x: jax.Array, places: list[slice]) -> jax.Array:
    return jnp.concatenate([x[place] for place in places], axis=0)


def _put(x: jax.Array, places: list[slice], new: jax.Array) -> jax.Array:
    """x with the rows at these places, in order, replaced by those of `new`."""
    pieces, end, used = [], 0, 0
    for place in places:
        size = place.stop - place.start
        pieces += [x[end : place.start], new[used : used + size]]
        end, used = place.stop, used + size
    return jnp.concatenate([piece for piece in [*pieces, x[end:]] if piece.shape[0]], axis=0)


def _add(x: jax.Array, places: list[slice], new: jax.Array) -> jax.Array:
    return _put(x, places, _take(x, places) + new)


def _sum(arrays: list[jax.Array]) -> jax.Array:
    return sum(arrays[1:], arrays[0])


def _parts(x: jax.Array, count: int) -> jax.Array:
    """float32 [C,W] -> bfloat16 [count*C,W]: numbers whose sum is x to 8 bits each, exactly if they are three."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return jnp.concatenate(parts, axis=0)


def move_up(x: jax.Array) -> jax.Array:
    """Every row to the one above; the last becomes zero."""
    return _replace_row(jnp.roll(x, -1, axis=0), x.shape[0] - 1, 0.0)


def move_down(x: jax.Array, first: float = 0.0) -> jax.Array:
    return _replace_row(jnp.roll(x, 1, axis=0), 0, first)


def _replace_row(x: jax.Array, row: int, value: float) -> jax.Array:
    at = row // SUBLANES * SUBLANES
    place = slice(at, at + SUBLANES)
    index = lax.broadcasted_iota(jnp.int32, (SUBLANES, x.shape[1]), 0)
    return _put(x, [place], jnp.where(index == row - at, value, x[place]))
