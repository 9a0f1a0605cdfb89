"""Short convolution for TPUs: one kernel forward and one backward, each at about the time its bytes take.

Both kernels see how far back a token may look: link_t tokens, to the start of its segment, or -1 for padding. With x
zeroed at padding tokens and [..] one or zero,

    y_t = sum_j [link_t >= j] w_{W-1-j} x_{t-j}
    g_j(s) = [link_{s+j} >= j] d_{s+j};   dx_s = [link_s >= 0] sum_j w_{W-1-j} g_j(s);   dw_{W-1-j} = sum_s x_s g_j(s)

The state before the first token touches W-1 rows only and is added to the kernels' results.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxhybrid_kernels.segments import segment_index

LANES = 128
ROWS = 16  # tokens at a time in registers: one bfloat16 tile
GROUP = 64  # tokens that the kernels keep in float32, to read them at shifted rows
HALO = 8  # rows kept from the tokens before (forward) or after (backward)
TOKENS = 512  # of a grid step
WIDTHS = (512, 256, 128)  # channels of a grid step; the backward has registers for 256 at most


class Edges(NamedTuple):
    """Where the rows of the state lie: before the first token that is not padding, and up to the last one."""

    first_rows: jax.Array  # [B,W-1] the first tokens, clipped to T-1
    first_used: jax.Array  # bool [B,W-1]: they are tokens of the first segment
    last_rows: jax.Array  # [B,W-1] the last tokens, clipped to 0
    last_used: jax.Array  # bool [B,W-1]: they are tokens of the last segment
    from_state: jax.Array  # int [B,W-1]: the row of the initial state found there instead, or -1


def convolution_refusal(x: jax.Array, weight: jax.Array) -> str | None:
    """Why the kernels cannot take these arguments, naming the argument and its value; None if they can."""
    if x.shape[2] % LANES:
        return f"x has C={x.shape[2]} channels, pallas_tpu takes multiples of {LANES}."
    if not 2 <= weight.shape[0] <= HALO:
        return f"weight has W={weight.shape[0]} taps, pallas_tpu takes 2 to {HALO}."
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x has dtype {x.dtype}, pallas_tpu takes float32 and bfloat16."
    return None


@jax.custom_vjp
def tpu_short_convolution(
    x: jax.Array, weight: jax.Array, segment_ids: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `short_convolution`; state [B,W-1,C] in x's dtype."""
    return _forward(x, weight, segment_ids, state)[0]


def _forward(x, weight, segment_ids, state):
    links, edges = find_links(x, segment_ids), find_edges(x, weight, segment_ids)
    (y,) = run(
        partial(forward_kernel, W=weight.shape[0]), "short_convolution_forward", links, weight, (x,), (x.dtype,), False
    )
    batch = jnp.arange(x.shape[0])[:, None]
    y = y.at[batch, edges.first_rows].add(from_initial_state(weight, state, edges).astype(y.dtype))
    final = final_state(x[batch, edges.last_rows], state, edges)
    return (y, final), (x, weight, segment_ids, state)


def _backward(kept, gradients):
    x, weight, segment_ids, state = kept
    d_y, d_final = gradients
    links, edges = find_links(x, segment_ids), find_edges(x, weight, segment_ids)
    W = weight.shape[0]
    d_x, d_weight = run(
        partial(backward_kernel, W=W), "short_convolution_backward", links, weight, (x, d_y), (x.dtype, None), True
    )
    batch = jnp.arange(x.shape[0])[:, None]
    _, pull = jax.vjp(lambda weight, state: from_initial_state(weight, state, edges), weight, state)
    d_weight_first, d_state = pull(d_y[batch, edges.first_rows].astype(jnp.float32))
    _, pull = jax.vjp(lambda rows, state: final_state(rows, state, edges), x[batch, edges.last_rows], state)
    d_rows, d_state_last = pull(d_final)
    d_x = d_x.at[batch, edges.last_rows].add(d_rows)
    d_weight = d_weight[:, :W].sum(axis=0) + d_weight_first.astype(jnp.float32)
    return d_x, d_weight.astype(weight.dtype), None, d_state + d_state_last


tpu_short_convolution.defvjp(_forward, _backward)


def find_links(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """int32 [B,T]."""
    position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    if segment_ids is None:
        return position
    index = segment_index(segment_ids)
    opens = jnp.concatenate([jnp.ones_like(index[:, :1], bool), index[:, 1:] != index[:, :-1]], axis=1)
    start = lax.cummax(jnp.where(opens, position, 0), axis=1)
    return jnp.where(segment_ids != 0, position - start, -1)


def find_edges(x: jax.Array, weight: jax.Array, segment_ids: jax.Array | None) -> Edges:
    B, T, _ = x.shape
    reach = weight.shape[0] - 1
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    real, index = ids != 0, segment_index(ids)
    some = jnp.any(real, axis=1, keepdims=True)
    first = jnp.where(some, jnp.argmax(real, axis=1, keepdims=True), 0)
    last = jnp.where(some, T - 1 - jnp.argmax(real[:, ::-1], axis=1, keepdims=True), -1)
    firsts, lasts = first + jnp.arange(reach), last + 1 - reach + jnp.arange(reach)
    first_rows, last_rows = jnp.minimum(firsts, T - 1), jnp.maximum(lasts, 0)

    def at(values, rows):
        return jnp.take_along_axis(values, rows, axis=1)

    first_used = (firsts < T) & at(real, first_rows) & (at(index, first_rows) == 0)
    last_used = (lasts >= first) & at(real, last_rows) & (at(index, last_rows) == index[:, -1:])
    from_state = jnp.where((lasts < first) & (lasts >= first - reach) & (index[:, -1:] == 0), lasts - first + reach, -1)
    return Edges(first_rows, first_used, last_rows, last_used, from_state)


def from_initial_state(weight: jax.Array, state: jax.Array, edges: Edges) -> jax.Array:
    """What the state adds to the first W-1 outputs, float32 [B,W-1,C]."""
    W = weight.shape[0]
    weight, state = weight.astype(jnp.float32), state.astype(jnp.float32)
    parts = [sum(weight[W - 1 - j] * state[:, W - 1 + i - j] for j in range(i + 1, W)) for i in range(W - 1)]
    return jnp.where(edges.first_used[..., None], jnp.stack(parts, axis=1), 0)


def final_state(rows: jax.Array, state: jax.Array, edges: Edges) -> jax.Array:
    """The last W-1 inputs of the last segment, [B,W-1,C], from x at `last_rows` and the initial state."""
    chosen = (edges.from_state[..., None] == jnp.arange(state.shape[1])).astype(state.dtype)
    old = jnp.einsum("bij,bjc->bic", chosen, state, precision="highest")
    return jnp.where(edges.last_used[..., None], rows, old)


def run(
    kernel: Callable[..., None],
    name: str,
    links: jax.Array,
    weight: jax.Array,
    arrays: tuple[jax.Array, ...],
    dtypes: tuple[Any, ...],
    reverse: bool,
) -> tuple[jax.Array, ...]:
    """Runs the kernel over (batch, channels, tokens). dtypes: of results like x; None is a [B,8,C] float32 sum."""
    B, T, C = arrays[0].shape
    width = next(width for width in WIDTHS[reverse:] if C % width == 0)
    tokens = min(TOKENS, -(-T // LANES) * LANES)
    steps = -(-T // tokens)
    links = jnp.pad(links, ((0, 0), (0, steps * tokens - T)), constant_values=-1)[:, None]
    # Each tap's row as a whole tile, so that the kernels need not spread it.
    weight = jnp.broadcast_to(weight.astype(jnp.float32)[:, None], (weight.shape[0], HALO, C))

    def at(t):
        return steps - 1 - t if reverse else t

    like_x = pl.BlockSpec((1, tokens, width), lambda b, c, t: (b, at(t), c))
    like_weight = pl.BlockSpec((1, HALO, width), lambda b, c, t: (b, 0, c))
    varying = jax.typeof(arrays[0]).manual_axis_type
    call = partial(
        pl.pallas_call,
        kernel,
        name=name,
        grid=(B, C // width, steps),
        in_specs=[
            pl.BlockSpec((1, 1, tokens), lambda b, c, t: (b, 0, at(t))),
            pl.BlockSpec((weight.shape[0], HALO, width), lambda b, c, t: (0, 0, c)),
            *[like_x] * len(arrays),
        ],
        out_specs=[like_x if dtype else like_weight for dtype in dtypes],
        out_shape=[
            jax.ShapeDtypeStruct((B, T if dtype else HALO, C), dtype or jnp.float32, manual_axis_type=varying)
            for dtype in dtypes
        ],
        scratch_shapes=[
            pltpu.VMEM((tokens, LANES), jnp.int32),
            pltpu.VMEM((GROUP + HALO, LANES), jnp.int32),
            pltpu.VMEM((GROUP + HALO, width), jnp.float32),
        ],
    )
    on_chip = call(compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")))
    return lax.platform_dependent(links, weight, *arrays, tpu=on_chip, cpu=call(interpret=True))


def spread(links_ref: Any) -> jax.Array:
    """Tokens from lanes to rows, the same in every lane."""
    return jnp.broadcast_to(links_ref[0], (LANES, links_ref.shape[2])).T


def tap(weight_ref: Any, i: int, tile: slice) -> jax.Array:
    """[ROWS,LANES], the same in every row."""
    return jnp.concatenate([weight_ref[i, :, tile]] * (ROWS // HALO))


def forward_kernel(links_ref, weight_ref, x_ref, y_ref, link_ref, near_ref, rows_ref, *, W):
    """rows_ref [HALO+GROUP,width]: x in float32, from HALO tokens before a group of tokens on."""
    tokens, width = x_ref.shape[1:]
    tiles = [slice(c, c + LANES) for c in range(0, width, LANES)]
    link_ref[...] = spread(links_ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        rows_ref[GROUP:] = jnp.zeros((HALO, width), jnp.float32)

    def step(i, _):
        group = pl.multiple_of(i * GROUP, GROUP)
        rows_ref[:HALO] = rows_ref[GROUP:]
        x = x_ref[0, pl.ds(group, GROUP)].astype(jnp.float32)
        real = link_ref[pl.ds(group, GROUP)] >= 0
        for tile in tiles:
            rows_ref[HALO:, tile] = jnp.where(real, x[:, tile], 0.0)
        for row in range(0, GROUP, ROWS):
            rows = pl.ds(pl.multiple_of(group + row, ROWS), ROWS)
            link = link_ref[rows]
            used = [link >= j for j in range(W)]
            for tile in tiles:
                y = jnp.zeros((ROWS, LANES), jnp.float32)
                for j in range(W):
                    start = HALO + row - j
                    y += tap(weight_ref, W - 1 - j, tile) * jnp.where(
                        used[j], rows_ref[start : start + ROWS, tile], 0.0
                    )
                y_ref[0, rows, tile] = y.astype(y_ref.dtype)

    lax.fori_loop(0, tokens // GROUP, step, None)


def backward_kernel(links_ref, weight_ref, x_ref, d_ref, dx_ref, dw_ref, link_ref, near_ref, rows_ref, *, W):
    """Tokens run backwards. rows_ref, near_ref [GROUP+HALO,..]: d in float32 and links, to HALO tokens past a group."""
    tokens, width = x_ref.shape[1:]
    tiles = [slice(c, c + LANES) for c in range(0, width, LANES)]
    link_ref[...] = spread(links_ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        near_ref[:HALO] = jnp.full((HALO, LANES), -1, jnp.int32)
        rows_ref[:HALO] = jnp.zeros((HALO, width), jnp.float32)
        dw_ref[...] = jnp.zeros_like(dw_ref)

    def step(i, sums):
        group = pl.multiple_of(tokens - GROUP - i * GROUP, GROUP)
        near_ref[GROUP:] = near_ref[:HALO]
        rows_ref[GROUP:] = rows_ref[:HALO]
        near_ref[:GROUP] = link_ref[pl.ds(group, GROUP)]
        rows_ref[:GROUP] = d_ref[0, pl.ds(group, GROUP)].astype(jnp.float32)
        sums = [list(totals) for totals in sums]
        for row in range(0, GROUP, ROWS):
            rows = pl.ds(pl.multiple_of(group + row, ROWS), ROWS)
            used = [near_ref[row + j : row + j + ROWS] >= j for j in range(W)]
            for tile, totals in zip(tiles, sums):
                x = jnp.where(used[0], x_ref[0, rows, tile].astype(jnp.float32), 0.0)
                dx = jnp.zeros_like(x)
                for j in range(W):
                    g = jnp.where(used[j], rows_ref[row + j : row + j + ROWS, tile], 0.0)
                    dx += tap(weight_ref, W - 1 - j, tile) * g
                    product = x * g
                    totals[j] = totals[j] + product[:HALO] + product[HALO:]
                dx_ref[0, rows, tile] = jnp.where(used[0], dx, 0.0).astype(dx_ref.dtype)
        return tuple(tuple(totals) for totals in sums)

    zeros = tuple(tuple(jnp.zeros((HALO, LANES), jnp.float32) for _ in range(W)) for _ in tiles)
    for tile, totals in zip(tiles, lax.fori_loop(0, tokens // GROUP, step, zeros)):
        for j in range(W):
            dw_ref[0, W - 1 - j : W - j, tile] += jnp.sum(totals[j], axis=0, keepdims=True)
