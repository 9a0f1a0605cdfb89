"""One token of a softmax layer between its projections in two kernels (Triton): parts of the caches side by side, with
the rotation before them and the new key and value written in place, and what joins the parts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.gpu.decode_attention import QUERIES, WIDTHS, parts_of
from jaxhybrid_kernels.gpu.layer_token import Places
from jaxhybrid_kernels.gpu.read_on import BETWEEN_PRODUCTS, Pieces, pieces_of, programs, run_or_read
from jaxhybrid_kernels.numerics import LOG2_E, NOTHING, on_nvidia, split_axes

MOST_KEYS = 2**15  # of all rows; with twice as many XLA is as fast


class Blocks(NamedTuple):
    """How the caches are divided."""

    keys: int  # at once; a power of two, at least 16
    warps: int
    programs: int  # about as many, at least one for each head of keys
    stages: int = 2  # blocks of keys in shared memory, where a program has several
    joining_warps: int = 4
    read_on: int = 0  # bytes of what comes next


# On an H200: 15 us at 1024 keys where XLA takes 22, and 18 at 8192, 28 at 32,768 where it takes 18 and 35.
SHORT = Blocks(keys=16, warps=2, programs=64, read_on=BETWEEN_PRODUCTS)
LONG = Blocks(keys=64, warps=4, programs=128)
LONG_CACHE = 2**12


def blocks_of(k_BGMK: jax.Array) -> Blocks:
    """How a cache is divided. In float32 the larger blocks are too much for the shared memory of some GPUs."""
    return SHORT if k_BGMK.shape[2] < LONG_CACHE or k_BGMK.dtype == jnp.float32 else LONG


def attention_token_refusal(
    projections_BO: jax.Array, rotation: tuple[jax.Array, jax.Array], k_BGMK: jax.Array, heads: int
) -> str | None:
    """Why the kernels cannot take these arguments, naming the value in the way; None if they can."""
    B, G, M, K = k_BGMK.shape
    if axes := split_axes(projections_BO, *rotation, k_BGMK):
        return f"the kernels run on whole arrays: they are split over {axes}."
    for name, array in (("projections", projections_BO), ("the cache", k_BGMK)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} has dtype {array.dtype}, the kernels take float32 and bfloat16."
    if heads // G > QUERIES or K not in WIDTHS:
        return f"there are {heads // G} queries of {K} channels a key head; the kernels take {QUERIES} of 64 or 128."
    if 2 * rotation[0].shape[-1] != K:
        return f"{2 * rotation[0].shape[-1]} of {K} channels are rotated; the kernels rotate whole heads."
    if M % (multiple := blocks_of(k_BGMK).keys) or B * M > MOST_KEYS:
        return f"the cache has {B} x {M} keys; the kernels take multiples of {multiple}, {MOST_KEYS} at most."
    return None


def attention_token(
    projections_BO: jax.Array,
    places: Places,
    rotation: tuple[jax.Array, jax.Array],
    k_BGMK: jax.Array,
    v_BGMK: jax.Array,
    index_B: jax.Array,
    *,
    heads: int,
    scale: float,
    dtype: Any,
    then: Sequence[jax.Array] = (),
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one token of each row, from the results of its projections to what its last projection takes.

    projections:    [B,O]: heads of K values one after the other, those of each kind together, anything after them.
    places:         the first head of each kind: so many `heads` of queries, G of keys and of values.
    rotation:       cosines and sines [B,K/2] of each pair (i, i + K/2), of queries and keys, in float32.
    k, v:           [B,G,M,K], the caches; written in place where they are donated. The keys of a block divide M.
    index:          [B]: the place of each row's token, which sees it and what is before it. Beyond M none is written.
    scale:          of the queries.
    dtype:          of the result.
    then:           as `linear_attention_token` has it.
    blocks:         None: as `blocks_of` has them.

    Returns out [B,heads*K] and the caches with the token. On a CPU the kernels are interpreted.
    """
    interpret, blocks = not on_nvidia(), blocks or blocks_of(k_BGMK)
    pieces = pieces_of(then, blocks.read_on, blocks.warps)
    out, top, total, k, v = _parts(
        projections_BO, places, rotation, k_BGMK, v_BGMK, index_B, heads, scale, blocks, pieces, interpret
    )
    return _joined(out, top, total, dtype, blocks.joining_warps, interpret), k, v


def _parts(
    projections: jax.Array,
    places: Places,
    rotation: tuple[jax.Array, jax.Array],
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    heads: int,
    scale: float,
    blocks: Blocks,
    pieces: list[Pieces],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Of each part S of the caches: values out [B,S,heads,K] by weights 2^(score - top), their greatest score and their
    sum [B,S,heads]; and the caches with the token."""
    (B, G, M, K), block = k.shape, blocks.keys
    R, half = heads // G, K // 2
    splits = parts_of(M, block, B * G, blocks.programs)
    length, precision = M // splits, lax.Precision.HIGHEST if k.dtype == jnp.float32 else None

    more = pl.cdiv(programs(pieces), B * G)  # of each row and head of keys

    def body(*refs: Any) -> None:
        row, head, split = (pl.program_id(axis) for axis in range(3))
        others, own = refs[6:-5], (*refs[:6], *refs[-5:])
        number = (row * G + head) * more + split - splits
        run_or_read(lambda: part_of(head, split, *own), split < splits, pieces, number, others, refs[-5])

    def part_of(head: Any, split: Any, *refs: Any) -> None:
        x_ref, cos_ref, sin_ref, index_ref, k_ref, v_ref, out_ref, top_ref, sum_ref, new_k_ref, new_v_ref = refs
        begin, index = split * length, index_ref[()]
        channel, row = jnp.arange(K), jnp.arange(QUERIES)
        pair, partner = channel % half, (channel + half) % K
        cos, sin = cos_ref.at[pair], sin_ref.at[pair]
        cos, sin = plt.load(cos), jnp.where(channel < half, -1.0, 1.0) * plt.load(sin)

        def own(first: Any, channel: jax.Array, **mask: Any) -> jax.Array:
            return plt.load(x_ref.at[first * K + channel], **mask).astype(jnp.float32)

        def turned(first: Any, **mask: Any) -> jax.Array:
            return (own(first, channel, **mask) * cos + own(first, partner, **mask) * sin).astype(k.dtype)

        queries = jnp.broadcast_to(row[:, None] < R, (QUERIES, K))
        q = turned(places.q + head * R + row[:, None], mask=queries, other=0.0)
        new_k, new_v = turned(places.k + head), own(places.v + head, channel).astype(v.dtype)

        def turn(number: Any, carry: Any) -> Any:
            out, top, total = carry
            here = pl.ds(number * block, block)
            place = begin + number * block + jnp.arange(block)
            # The token's key and value are not read back: other programs may not see yet what is written.
            before, is_new = (place < index)[:, None], (place == index)[:, None]
            keys = jnp.where(is_new, new_k[None], k_ref[here, :])
            values = jnp.where(is_new, new_v[None], jnp.where(before, v_ref[here, :], jnp.zeros((), v.dtype)))
            scores = plt.dot(q, keys.T, precision=precision) * (scale * LOG2_E)
            scores = jnp.where((place <= index)[None], scores, NOTHING)
            new = jnp.maximum(top, jnp.max(scores, axis=1))
            weights, kept = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
            out = out * kept[:, None] + plt.dot(weights.astype(v.dtype), values, precision=precision)
            return out, new, total * kept + jnp.sum(weights, axis=1)

        carry: Any = jnp.zeros((QUERIES, K), jnp.float32), jnp.full((QUERIES,), NOTHING), jnp.zeros((QUERIES,))
        if length == block:  # what it reads does not wait for the index
            carry = turn(0, carry)
        else:
            carry = lax.fori_loop(0, pl.cdiv(jnp.clip(index + 1 - begin, 0, length), block), turn, carry)
        out, top, total = carry
        plt.store(out_ref.at[head * R + row[:, None], channel[None]], out, mask=queries)
        plt.store(top_ref.at[head * R + row], top, mask=row < R)
        plt.store(sum_ref.at[head * R + row], total, mask=row < R)
        is_own = (channel >= 0) & (index >= begin) & (index < begin + length)
        at = jnp.minimum(index, M - 1)
        plt.store(new_k_ref.at[at, channel], new_k, mask=is_own)
        plt.store(new_v_ref.at[at, channel], new_v, mask=is_own)

    def of_row(*shape: int) -> Any:
        return pl.BlockSpec((None, *shape), lambda row, head, split: (row, *[0] * len(shape)))

    part = pl.BlockSpec((None, None, length, K), lambda row, head, split: (row, head, split, 0))
    cache = pl.BlockSpec((None, None, M, K), lambda row, head, split: (row, head, 0, 0))
    sums = pl.BlockSpec((None, None, heads), lambda row, head, split: (row, split, 0))
    return pl.pallas_call(
        body,
        grid=(B, G, splits + more),
        in_specs=[
            of_row(projections.shape[1]), of_row(half), of_row(half), of_row(), part, part,
            *[pl.no_block_spec] * len(pieces),
        ],
        out_specs=[
            pl.BlockSpec((None, None, heads, K), lambda row, head, split: (row, split, 0, 0)), sums, sums, cache, cache
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct((B, splits, heads, *rest), jnp.float32) for rest in ((K,), (), ())],
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        ],
        input_output_aliases={4: 3, 5: 4},
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_token",
    )(projections, *rotation, index, k, v, *(each.array for each in pieces))  # fmt: skip


def _joined(
    out_BSHK: jax.Array, top_BSH: jax.Array, total_BSH: jax.Array, dtype: Any, warps: int, interpret: bool
) -> jax.Array:
    B, S, H, K = out_BSHK.shape

    def body(out_ref: Any, top_ref: Any, sum_ref: Any, joined_ref: Any) -> None:
        top = top_ref[...]
        share = jnp.exp2(top - jnp.max(top))
        out = jnp.sum(out_ref[...] * share[:, None], axis=0) / jnp.sum(sum_ref[...] * share)
        joined_ref[...] = out.astype(dtype)

    sums = pl.BlockSpec((None, S, None), lambda row, head: (row, 0, head))
    return pl.pallas_call(
        body,
        grid=(B, H),
        in_specs=[pl.BlockSpec((None, S, None, K), lambda row, head: (row, 0, head, 0)), sums, sums],
        out_specs=pl.BlockSpec((None, K), lambda row, head: (row, head)),
        out_shape=jax.ShapeDtypeStruct((B, H * K), dtype),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="attention_token_joined",
    )(out_BSHK, top_BSH, total_BSH)
