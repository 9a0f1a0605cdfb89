"""Decays per channel between tokens of a chunk, as running products inside of runs, and the operands made from them.

exp(G_i - G_j), G the running sum of log_decay, has to be split between the operands of a product, and neither exp(G)
nor exp(-G) has a bound. It can be split around a border between j and i. So the triangle is filled by halves: for runs
of 32, 16, ..., 1 tokens, the second run of a pair of runs meets the first around the border between them,
    exp(G_i - G_j) = (product of decays from the border through i) (product of decays after j until the border).
No factor is above one and none is divided by, so that nothing overflows and a decay of zero parts segments.

Only the second runs read and only the first ones are read: at a level 32 rows of queries and as many of keys meet 32
rows of keys, packed without gaps into one tile. A warp has 16 tokens, and each of its lanes a 32nd of their channels.
So products over a warp's tokens stay in a lane, and longer ones need the totals of other warps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, math
from jax.experimental.mosaic import gpu as mgpu

from jaxhybrid_kernels.gpu.plan import BLOCK, CHUNK
from jaxhybrid_kernels.gpu.products import TILED
from jaxhybrid_kernels.numerics import LOG2_E

RUNS = (32, 16, 8, 4, 2, 1)
HALF = CHUNK // 2
READERS, READ = 2 * HALF, HALF  # rows of queries and keys, and of keys that they meet, in a level's tile
WARPS, OF_WARP = 4, 16  # tokens
ROW_BYTES, SWIZZLED_ROWS = 128, 8
AT_ONCE = 8  # rows loaded before the first of them is stored
LANES = 32  # of a warp
TILE = plgpu.RefType(TILED)
PLAIN = plgpu.RefType()


def layout(K: int) -> Any:
    """Of decays [64,K]."""
    tiling = plgpu.Tiling(((CHUNK, K), (OF_WARP, K), (K // LANES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-2,), vector_dim=-1)


def load_decay(log_decay: Any, *, interpret: bool) -> jax.Array:
    """exp(log_decay) [64,K], from float32 in the GPU's memory."""
    if interpret:
        return jnp.exp2(log_decay[...] * LOG2_E)
    return lax.exp2(plgpu.load(log_decay, layout=layout(log_decay.shape[-1]), optimized=False) * LOG2_E)


def write_totals(decay: jax.Array, totals: Any, *, interpret: bool) -> None:
    """The product of each warp's decays, to totals [4,K] float32 in shared memory."""
    if interpret:
        totals[...] = jnp.prod(decay.reshape(WARPS, OF_WARP, -1), axis=1)
        return

    def emit(_: Any, decay: Any, totals: Any) -> tuple[()]:
        llvm.store(_product(_registers(decay)), _channels(totals, _warp()))
        return ()

    plgpu.inline_mgpu(arg_types=(layout(decay.shape[1]), PLAIN), return_type=())(emit)(decay, totals)


def keep_decay(decay: jax.Array, tiles: tuple[Any, Any], *, interpret: bool) -> Any:
    """decay [64,64] for `write_factors`, out of registers: each lane's own in two tiles [64,64] of 16 bits in shared
    memory, which no product may read as they are."""
    if interpret:
        return decay

    def emit(_: Any, decay: Any, *tiles: Any) -> tuple[()]:
        mgpu.utils.warpgroup_barrier()  # other warps may still read the tiles
        for value, place in zip(_registers(decay), _kept(tiles), strict=True):
            llvm.store(value, place)
        return ()

    plgpu.inline_mgpu(arg_types=(layout(BLOCK), TILE, TILE), return_type=())(emit)(decay, *tiles)
    return tiles


def write_level(
    size: int, decay: jax.Array, q: Any, k: Any, totals: Any, tile: Any, *, delta: bool, interpret: bool
) -> None:
    """Queries and, if delta, keys of the second runs, and keys of the first ones, to tile [halves,96,64], with what is
    left of them at the border; q, k [halves,64,64] and the tile in shared memory."""
    if interpret:
        by_run = (CHUNK // (2 * size), 2, size, decay.shape[1])
        first, second = (decay.reshape(by_run)[:, i] for i in (0, 1))
        until, since = _after(first, 1).astype(jnp.bfloat16), jnp.cumprod(second, 1).astype(jnp.bfloat16)
        queries, keys = (_joined(x).reshape(by_run) for x in (q, k))
        for i, rows in enumerate((queries[:, 1] * since, keys[:, 1] * since, keys[:, 0] * until)):
            _part(rows.reshape(HALF, -1), tile, i * HALF)
        return

    def emit(_: Any, decay: Any, q: Any, k: Any, totals: Any, tile: Any) -> tuple[()]:
        decays, warp = _registers(decay), _warp()
        queries, keys, gated = (_Rows(x) for x in (q, k, tile))
        own = _times(warp, OF_WARP)

        def write(rows: list[_Copy], base: ir.Value) -> None:
            _gate(rows, own, gated, base)

        def read(factors: list[Any], token: int, row: int) -> list[_Copy]:
            copies = [_Copy(keys, token + i, factor, READERS + row + i) for i, factor in enumerate(factors)]
            return copies[::-1]  # as the factors are made

        def reading(factors: list[Any], token: int, row: int) -> list[_Copy]:
            sources = [(queries, 0), (keys, HALF)] if delta else [(queries, 0)]
            return [_Copy(x, token + i, factor, at + row + i) for i, factor in enumerate(factors) for x, at in sources]

        if size < OF_WARP:
            tokens = []
            for start in range(0, OF_WARP, 2 * size):
                border, end = start + size, start + 2 * size
                tokens += read(_remaining(decays[start:border]), start, start // 2)
                tokens += reading(_running(decays[border:end]), border, start // 2)
            write(tokens, _times(warp, OF_WARP // 2))
            return ()
        place = arith.shrui(warp, _int(1)) if size == OF_WARP else arith.andi(warp, _int(1))
        for second, factors in _towards_border(decays, totals, size):
            write((reading if second else read)(factors, 0, 0), _times(place, OF_WARP))
        return ()

    arg_types = (layout(decay.shape[1]), TILE, TILE, PLAIN, TILE)
    plgpu.inline_mgpu(arg_types=arg_types, return_type=())(emit)(decay, q, k, totals, tile)


def write_factors(
    decay: Any, totals: Any, tile: Any, *, size: int | None = None, leaving: bool = False, interpret: bool
) -> None:
    """What is left at the border of a level, or without a size of the state when a token reads it, or if leaving of a
    token at the chunk's end: to tile [64,64] bfloat16, of which a warp's tokens are written by that warp."""
    if interpret:
        if size is None:
            factors = _after(decay, 0) if leaving else jnp.cumprod(decay, 0)
        else:
            runs = decay.reshape(CHUNK // (2 * size), 2, size, BLOCK)
            factors = jnp.stack([_after(runs[:, 0], 1), jnp.cumprod(runs[:, 1], 1)], axis=1).reshape(CHUNK, BLOCK)
        tile[...] = factors.astype(jnp.bfloat16)
        return

    kept = isinstance(decay, tuple)

    def emit(_: Any, decay: Any, totals: Any, tile: Any) -> tuple[()]:
        rows, own = _Rows(tile), _times(_warp(), OF_WARP)
        decays = [llvm.load(_floats(2), place) for place in _kept(decay)] if kept else _registers(decay)
        one = _splat(1.0, decays[0].type)

        def write(factors: Sequence[Any], token: int) -> None:
            for i, factor in enumerate(factors):
                rows.store(_rounded(one if factor is None else factor), own, token + i)

        mgpu.utils.warp_barrier()
        if size is None:
            entering, left, _ = _through_chunk(decays, totals)
            write(left if leaving else entering, 0)
        elif size < OF_WARP:
            for start in range(0, OF_WARP, 2 * size):
                write(_remaining(decays[start : start + size]), start)
                write(_running(decays[start + size : start + 2 * size]), start + size)
        else:
            for _, factors in _towards_border(decays, totals, size):
                write(factors, 0)
        mgpu.utils.warp_barrier()
        return ()

    arg_types = ((TILE, TILE) if kept else layout(BLOCK), PLAIN, TILE)
    plgpu.inline_mgpu(arg_types=arg_types, return_type=())(emit)(decay, totals, tile)


def meeting(size: jax.Array, x: jax.Array, *, reading: bool | None = None, interpret: bool) -> jax.Array:
    """x [64,64] bfloat16, a product's result, where the tokens of row and column meet at a level, zero elsewhere; of
    rows that read or are read alone if it is given which."""
    if interpret:
        row, column = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        apart = row ^ column
        meet = (apart >= size) & (apart < 2 * size)
        if reading is not None:
            meet &= ((row & size) != 0) == reading
        return jnp.where(meet, x, jnp.zeros_like(x))

    def emit(_: Any, size: Any, x: Any) -> Any:
        i32, warp = ir.IntegerType.get_signless(32), _warp()
        size = size.registers.item()
        quad, in_quad = arith.shrui(_lane(), _int(2)), arith.andi(_lane(), _int(3))
        results = np.empty_like(x.registers)
        # Of two columns either both or none meet a row, but at the last level, where it is the one beside the row.
        last = _equal(size, 1)
        shift = arith.select(last, _int(1), math.cttz(size))
        wanted = arith.select(last, _int(0), _int(1))
        beside = arith.select(_is(arith.andi(quad, _int(1))), _int(0xFFFF), _int(-0x10000))
        mask = arith.select(last, beside, _int(-1))
        own_row = arith.addi(_times(warp, OF_WARP), quad)
        apart = arith.shrui(arith.xori(own_row, _times(in_quad, 2)), shift)  # first row and columns
        for half in range(2):
            of_row = mask
            if reading is not None:
                second = _is(arith.andi(arith.xori(own_row, _int(8 * half)), size))
                of_row = arith.select(second if reading else _not(second), mask, _int(0))
            for tile in range(CHUNK // 8):
                at = (0, tile, 0, 0, half, 0, 0, 0, 0)
                there = arith.xori(arith.shrui(_int(8 * tile ^ 8 * half), shift), wanted)
                kept = arith.select(_same(apart, there), of_row, _int(0))
                value = arith.andi(mgpu.utils.bitcast(x.registers[at], i32), kept)
                results[at] = mgpu.utils.bitcast(value, x.registers[at].type)
        return mgpu.FragmentedArray(_registers=results, _layout=x.layout, _is_signed=None)

    kept = plgpu.Layout.WGMMA
    shape = plgpu.ShapeDtypeStruct((CHUNK, CHUNK), x.dtype, layout=kept)
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, kept), return_type=shape)(emit)(size, x)


def write_level_matrices(
    size: int, products: jax.Array, scale: float, beta: Any, pair: Any, strict: Any, *, interpret: bool
) -> None:
    """Puts a level's products [64,32], of queries and of keys with keys, where their tokens meet: the first times scale
    to pair [64,64] bfloat16, the second times beta [64] (in the GPU's memory) to strict [64,64] float16, if there is
    one."""
    if interpret:
        for x, matrix in ((products[:HALF] * scale, pair), (products[HALF:], strict)):
            if matrix is None:
                continue
            runs = HALF // size
            x = x.reshape(runs, size, runs, size)
            x = jnp.stack([jnp.zeros_like(x), x], axis=1)
            x = jnp.stack([x, jnp.zeros_like(x)], axis=4).reshape(CHUNK, CHUNK)
            if matrix is strict:
                x = x * beta[...][:, None]
            row, column = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
            apart = row ^ column
            meet = (row > column) & (apart >= size) & (apart < 2 * size)
            matrix[...] = jnp.where(meet, x.astype(matrix.dtype), matrix[...])
        return

    refs = (beta, pair) if strict is None else (beta, pair, strict)

    def emit(_: Any, products: Any, beta: Any, pair: Any, strict: Any = None) -> tuple[()]:
        warp, lane = _warp(), _lane()
        quad, in_quad = arith.shrui(lane, _int(2)), arith.andi(lane, _int(3))
        upper = arith.andi(warp, _int(1))
        mgpu.utils.warpgroup_barrier()  # other warps may still read the tile, which is written next
        registers = products.registers  # [1, tile of 8 columns, 1, 1, half, 1, ...] pairs of columns

        def of(tile: int, half: int) -> ir.Value:
            return registers[0, tile, 0, 0, half, 0, 0, 0, 0]

        def spread(rank: ir.Value, offset: int) -> ir.Value:
            """The token of a rank among those of all second (offset size) or first runs."""
            return arith.addi(arith.addi(rank, arith.andi(rank, _int(-size))), _int(offset))

        def write(matrix: Any, kind: ir.Type, weigh: Callable[[ir.Value, ir.Value], ir.Value]) -> None:
            target = _Elements(matrix)
            for half in range(2):
                rank = arith.addi(arith.addi(_times(upper, 16), _int(8 * half)), quad)
                token = spread(rank, size)
                if size >= 32:
                    pairs = [(of(tile, half), _int(tile)) for tile in range(4)]
                else:  # of the tiles of eight columns, one or two are in the runs of these rows
                    tiles = range(2) if size == 16 else (half,)
                    pairs = [
                        (arith.select(_is(upper), of(2 + i, half), of(i, half)), arith.addi(_times(upper, 2), _int(i)))
                        for i in tiles
                    ]
                for value, tile in pairs:
                    column = arith.addi(_times(tile, 8), _times(in_quad, 2))
                    value = weigh(value, token)
                    if size == 1:
                        odd = arith.andi(quad, _int(1))
                        one = arith.select(_is(odd), _element(value, 1), _element(value, 0))
                        with _when(_same(arith.shrui(quad, _int(1)), in_quad)):
                            target.store(arith.truncf(kind, one), token, spread(arith.addi(column, odd), 0))
                        continue
                    packed = arith.truncf(ir.VectorType.get((2,), kind), value)
                    if size >= 8:
                        target.store(packed, token, spread(column, 0))
                    else:
                        shift = size.bit_length() - 1
                        with _when(_same(arith.shrui(quad, _int(shift)), arith.shrui(in_quad, _int(shift - 1)))):
                            target.store(packed, token, spread(column, 0))

        of_queries = _not(_is(arith.shrui(warp, _int(1))))
        f32 = ir.F32Type.get()
        with _when(of_queries):
            write(pair, ir.BF16Type.get(), lambda value, _: arith.mulf(value, _splat(scale, _floats(2))))
        if strict is not None:
            betas = mgpu.utils.memref_ptr(beta)

            def times_beta(value: ir.Value, token: ir.Value) -> ir.Value:
                weight = llvm.load(f32, _offset(betas, _times(token, 4)))
                return arith.mulf(value, mgpu.utils.vector.from_elements(_floats(2), [weight, weight]))

            with _when(_not(of_queries)):
                write(strict, ir.F16Type.get(), times_beta)
        return ()

    arg_types = (plgpu.Layout.WGMMA, PLAIN, *(TILE,) * (len(refs) - 1))
    plgpu.inline_mgpu(arg_types=arg_types, return_type=())(emit)(products, *refs)


def write_diagonal(products: jax.Array, scale: float, pair: Any, *, interpret: bool) -> None:
    """The diagonal of products [64,64] times scale, to that of pair [64,64] bfloat16."""
    if interpret:
        row, column = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        pair[...] = jnp.where(row == column, (products * scale).astype(pair.dtype), pair[...])
        return

    def emit(_: Any, products: Any, pair: Any) -> tuple[()]:
        warp, lane = _warp(), _lane()
        quad, in_quad = arith.shrui(lane, _int(2)), arith.andi(lane, _int(3))
        mgpu.utils.warpgroup_barrier()  # other warps may still read the keys, which are written next
        target = _Elements(pair)
        is_odd = _is(arith.andi(quad, _int(1)))
        for half in range(2):
            value = products.registers[0, half, 0, 0, half, 0, 0, 0, 0]
            for other in range(1, WARPS):
                here = _equal(warp, other)
                value = arith.select(here, products.registers[0, 2 * other + half, 0, 0, half, 0, 0, 0, 0], value)
            one = arith.select(is_odd, _element(value, 1), _element(value, 0))
            one = arith.truncf(ir.BF16Type.get(), arith.mulf(one, mgpu.c(scale, ir.F32Type.get())))
            token = arith.addi(arith.addi(_times(warp, OF_WARP), _int(8 * half)), quad)
            with _when(_same(arith.shrui(quad, _int(1)), in_quad)):
                target.store(one, token, token)
        return ()

    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, TILE), return_type=())(emit)(products, pair)


def write_gated(
    decay: jax.Array, scale: float, totals: Any, q: Any, k: Any, k_out: Any, carry: Any, *, delta: bool, interpret: bool
) -> None:
    """Queries times scale, and keys if delta, with what is left of the state when they read it, in place; keys with
    what is left of them at the chunk's end, to k_out; and what is left of the state there, to carry [K] float32 in the
    GPU's memory. q, k, k_out [halves,64,64] in shared memory."""
    if interpret:
        entry, leaving = jnp.cumprod(decay, 0), _after(decay, 0)
        queries, keys = _joined(q), _joined(k)
        _part(queries * (entry * scale).astype(jnp.bfloat16), q)
        if delta:
            _part(keys * entry.astype(jnp.bfloat16), k)
        _part(keys * leaving.astype(jnp.bfloat16), k_out)
        carry[...] = entry[-1]
        return

    def emit(_: Any, decay: Any, totals: Any, q: Any, k: Any, k_out: Any, carry: Any) -> tuple[()]:
        decays, warp = _registers(decay), _warp()
        queries, keys, left = (_Rows(x) for x in (q, k, k_out))
        own = _times(warp, OF_WARP)
        enters, leaves, total = _through_chunk(decays, totals)
        with _when(_not(_is(warp))):
            llvm.store(total, _channels(carry, _int(0)))
        scales = _splat(scale, total.type)
        _gate([_Copy(keys, i, leaves[i], i) for i in reversed(range(OF_WARP))], own, left, own)
        if delta:
            _gate([_Copy(keys, i, enters[i], i) for i in range(OF_WARP)], own, keys, own)
        _gate([_Copy(queries, i, arith.mulf(enters[i], scales), i) for i in range(OF_WARP)], own, queries, own)
        return ()

    arg_types = (layout(decay.shape[1]), PLAIN, TILE, TILE, TILE, PLAIN)
    plgpu.inline_mgpu(arg_types=arg_types, return_type=())(emit)(decay, totals, q, k, k_out, carry)


def _after(x: jax.Array, axis: int) -> jax.Array:
    """Products of what follows along the axis."""
    following = jnp.concatenate(
        [lax.slice_in_dim(x, 1, None, axis=axis), jnp.ones_like(lax.slice_in_dim(x, 0, 1, axis=axis))], axis
    )
    return jnp.flip(jnp.cumprod(jnp.flip(following, axis), axis), axis)


def _joined(block: Any) -> jax.Array:
    """[halves,rows,64] -> [rows,K]"""
    return jnp.concatenate([block.at[half][...] for half in range(block.shape[0])], axis=1)


def _part(x: jax.Array, block: Any, start: int = 0) -> None:
    """Writes x [rows,K] to rows of block [halves,rows,64] from start on."""
    for half in range(block.shape[0]):
        block.at[half, pl.ds(start, len(x))][...] = x[:, half * BLOCK : (half + 1) * BLOCK]


# What follows is for one lane. Its registers have neighbouring channels of one token.


def _registers(x: Any) -> list[ir.Value]:
    return list(x.registers.flat)


def _kept(tiles: Sequence[Any]) -> Iterator[ir.Value]:
    """Where a lane keeps two float32 for each of a warp's tokens."""
    for tile in tiles:
        for i in range(OF_WARP // 2):
            begin = _offset(mgpu.utils.memref_ptr(tile), _times(mgpu.utils.thread_idx(), 8))
            yield _offset(begin, _int(i * 8 * LANES * WARPS))


def _running(decays: Sequence[ir.Value], start: ir.Value | None = None) -> list[ir.Value]:
    """Products through each."""
    products: list[ir.Value] = []
    for decay in decays:
        start = decay if start is None else arith.mulf(start, decay)
        products.append(start)
    return products


def _remaining(decays: Sequence[ir.Value], start: ir.Value | None = None) -> list[ir.Value | None]:
    """Products of those after each; None is one."""
    return [start, *_running(decays[:0:-1], start)][::-1]


def _product(decays: Sequence[ir.Value]) -> ir.Value:
    """Pair by pair: the products on the way are those of no level, which the compiler would keep in registers."""
    while len(decays) > 1:
        decays = [arith.mulf(x, y) for x, y in zip(decays[::2], decays[1::2], strict=True)]
    return decays[0]


def _rounded(x: ir.Value) -> ir.Value:
    return arith.truncf(ir.VectorType.get(x.type.shape, ir.BF16Type.get()), x)


def _int(value: int) -> ir.Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _times(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, _int(factor))


def _not(condition: ir.Value) -> ir.Value:
    return arith.xori(condition, mgpu.c(1, ir.IntegerType.get_signless(1)))


def _floats(count: int) -> ir.Type:
    return ir.VectorType.get((count,), ir.F32Type.get())


def _splat(value: float, kind: ir.Type) -> ir.Value:
    return mgpu.c(value, kind)


def _element(pair: ir.Value, index: int) -> ir.Value:
    return mgpu.utils.vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def _total(totals: Any, warp: int) -> ir.Value:
    """Of another warp's decays, by the lane's channels."""
    return llvm.load(_floats(totals.type.shape[-1] // LANES), _channels(totals, _int(warp)))


def _towards_border(decays: Sequence[ir.Value], totals: Any, size: int) -> Iterator[tuple[bool, list[Any]]]:
    """For runs of whole warps: (whether they are second ones, the factors of the warp's tokens), in code for the warps
    that these concern."""
    warp, warps = _warp(), size // OF_WARP
    second = _is(arith.andi(warp, _int(warps)))
    first_or_last = _is(arith.xori(arith.andi(arith.addi(warp, arith.shrui(warp, _int(1))), _int(1)), _int(1)))

    def between(neighbour: int) -> ir.Value | None:
        if warps == 1:
            return None
        total = _total(totals, neighbour)
        return arith.select(first_or_last, total, _splat(1.0, total.type))

    with _when(second):
        yield True, _running(decays, between(2))
    with _when(_not(second)):
        yield False, _remaining(decays, between(1))


def _through_chunk(decays: Sequence[ir.Value], totals: Any) -> tuple[list[ir.Value], list[Any], ir.Value]:
    """Products of a chunk's decays through each token of the warp, of those after each, and of all."""
    warp, total = _warp(), [_total(totals, w) for w in range(WARPS)]
    one = _splat(1.0, total[0].type)
    before, behind = [one, *_running(total)], [*_remaining(total)[:-1], one]
    entry, leaving = before[0], behind[0]
    for w in range(1, WARPS):
        here = _equal(warp, w)
        entry, leaving = arith.select(here, before[w], entry), arith.select(here, behind[w], leaving)
    return _running(decays, entry), _remaining(decays, leaving), before[-1]


def _warp() -> ir.Value:
    return arith.remui(mgpu.utils.warp_idx(), _int(WARPS))


def _lane() -> ir.Value:
    return arith.remui(mgpu.utils.thread_idx(), _int(32))


def _is(x: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ne, x, _int(0))


def _same(x: ir.Value, y: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, x, y)


def _equal(x: ir.Value, value: int) -> ir.Value:
    return _same(x, _int(value))


def _when(condition: ir.Value) -> AbstractContextManager[None]:
    return mgpu.utils.when(condition)


def _offset(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _channels(ref: Any, row: ir.Value) -> ir.Value:
    """Where a lane's channels are in [K], or in a row of [rows,K], float32."""
    K = ref.type.shape[-1]
    offset = _times(_lane(), 4 * (K // LANES))
    return _offset(mgpu.utils.memref_ptr(ref), arith.addi(offset, _times(row, 4 * K)))


class _Rows:
    """A tile [rows,64] or [2,rows,64] of 16 bits in shared memory; a lane has two or four channels of a row."""

    def __init__(self, ref: Any) -> None:
        *halves, blocks, _, _, _ = ref.type.shape
        self.pointer, lane = mgpu.utils.memref_ptr(ref), _lane()
        self.channels = 4 if halves == [2] else 2
        if self.channels == 4:
            half = arith.shrui(lane, _int(4))
            self.pointer = _offset(self.pointer, _times(half, ROW_BYTES * SWIZZLED_ROWS * blocks))
            lane = arith.andi(lane, _int(LANES // 2 - 1))
        in_row = _times(lane, 2 * self.channels)
        self.places = [arith.xori(in_row, _int(16 * row)) for row in range(SWIZZLED_ROWS)]

    def _at(self, base: ir.Value, row: int) -> ir.Value:
        """base a multiple of 8 rows"""
        begin = _offset(self.pointer, arith.addi(_times(base, ROW_BYTES), self.places[row % SWIZZLED_ROWS]))
        return mgpu.utils.getelementptr(begin, [ROW_BYTES * row], ir.IntegerType.get_signless(8))

    def load(self, base: ir.Value, row: int) -> ir.Value:
        return llvm.load(ir.VectorType.get((self.channels,), ir.BF16Type.get()), self._at(base, row))

    def store(self, value: ir.Value, base: ir.Value, row: int) -> None:
        llvm.store(value, self._at(base, row))


class _Copy(NamedTuple):
    """A row of `source`, times factor unless that is one, for a row of another tile."""

    source: _Rows
    token: int
    factor: ir.Value | None
    row: int


def _gate(copies: Sequence[_Copy], from_base: ir.Value, target: _Rows, base: ir.Value) -> None:
    """Many loads come before the stores: the compiler cannot tell that what is stored is not loaded next."""
    for begin in range(0, len(copies), AT_ONCE):
        batch = copies[begin : begin + AT_ONCE]
        loaded = [copy.source.load(from_base, copy.token) for copy in batch]
        for x, copy in zip(loaded, batch, strict=True):
            target.store(x if copy.factor is None else arith.mulf(x, _rounded(copy.factor)), base, copy.row)


class _Elements:
    """A tile [64,64] of 16 bits in shared memory, by row and column."""

    def __init__(self, ref: Any) -> None:
        self.pointer = mgpu.utils.memref_ptr(ref)

    def store(self, value: ir.Value, row: ir.Value, column: ir.Value) -> None:
        swizzle = _times(arith.andi(row, _int(SWIZZLED_ROWS - 1)), 16)
        in_row = arith.xori(_times(column, 2), swizzle)
        llvm.store(value, _offset(self.pointer, arith.addi(_times(row, ROW_BYTES), in_row)))
