"""Softmax attention of one query a row to a cache (Triton): parts of the cache side by side, joined afterwards."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.numerics import HOPPER, LOG2_E, NOTHING, gpu_capability

QUERIES = 16  # rows of the smallest matrix product
WIDTHS = (64, 128)
MULTIPLE = 128  # of keys
FEWEST_KEYS = 2**16  # of all rows; not measured: the gain was measured with 2^21
# Of one row XLA is faster up to here (H200, 2 heads of 128 channels: 65,536 keys in 36 us, by the kernel in 41).
MOST_KEYS_ALONE = 2**16


class Blocks(NamedTuple):
    """How the caches are divided."""

    keys: int  # at once; a power of two
    warps: int
    stages: int  # blocks in shared memory
    programs: int  # about as many, at least one for each head of keys


ON_HOPPER = Blocks(keys=128, warps=8, stages=3, programs=264)  # 192 KiB of shared memory with 128 channels
ELSEWHERE = Blocks(keys=64, warps=4, stages=3, programs=528)


def parts_of(keys: int, block: int, heads: int, programs: int) -> int:
    """Of the cache of each head, whole blocks: a power of two, and of all heads about as many as `programs`."""
    return math.gcd(keys // block, 1 << max(programs // heads - 1, 0).bit_length())


def decode_attention_refusal(q_BGRK: jax.Array, k_BGMK: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, naming the value in the way; None if it can."""
    (B, _, R, K), M = q_BGRK.shape, k_BGMK.shape[2]
    if axes := jax.typeof(q_BGRK).manual_axis_type.varying:
        return f"q varies over the mesh axes {sorted(axes)}."
    if q_BGRK.dtype != jnp.bfloat16 or k_BGMK.dtype != jnp.bfloat16:
        return f"q and k have dtypes {q_BGRK.dtype} and {k_BGMK.dtype}, the kernel takes bfloat16."
    if R > QUERIES or K not in WIDTHS:
        return f"q has {R} queries of {K} channels a key head; the kernel takes up to {QUERIES} of 64 or 128."
    if M % MULTIPLE or B * M < FEWEST_KEYS or (B == 1 and M <= MOST_KEYS_ALONE):
        return (
            f"the cache has {B} x {M} keys; the kernel takes multiples of {MULTIPLE}, {FEWEST_KEYS} at least, and of"
            f" one row more than {MOST_KEYS_ALONE}."
        )
    return None


def decode_attention_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, last: jax.Array, *, blocks: Blocks | None = None, interpret: bool = False
) -> jax.Array:
    """q [B,G,R,K], R <= 16, to the keys up to `last` [B] of k and v [B,G,M,K]: [B,G,R,K] float32.

    The keys of a block divide M. Nothing behind `last` is read, but for the rest of its block.
    """
    if blocks is None:
        blocks = ON_HOPPER if gpu_capability() == HOPPER else ELSEWHERE
    (B, G, R, K), M, block = q.shape, k.shape[2], blocks.keys
    splits = parts_of(M, block, B * G, blocks.programs)
    length = M // splits
    q = jnp.pad(q, ((0, 0), (0, 0), (0, QUERIES - R), (0, 0)))

    def body(q_ref: Any, k_ref: Any, v_ref: Any, last_ref: Any, out_ref: Any, top_ref: Any, sum_ref: Any) -> None:
        count = jnp.clip(last_ref[()] + 1 - pl.program_id(2) * length, 0, length)
        q = q_ref[...]

        def turn(number: jax.Array, carry: Any) -> Any:
            out, top, total = carry
            here = pl.ds(number * block, block)
            scores = plt.dot(q, k_ref[here, :].T) * (K**-0.5 * LOG2_E)
            seen = number * block + jnp.arange(block) < count
            scores = jnp.where(seen[None], scores, NOTHING)
            new = jnp.maximum(top, jnp.max(scores, axis=1))
            weights, kept = jnp.exp2(scores - new[:, None]), jnp.exp2(top - new)
            out = out * kept[:, None] + plt.dot(weights.astype(v_ref.dtype), v_ref[here, :])
            return out, new, total * kept + jnp.sum(weights, axis=1)

        nothing = jnp.zeros((QUERIES, K), jnp.float32), jnp.full((QUERIES,), NOTHING), jnp.zeros((QUERIES,))
        out_ref[...], top_ref[...], sum_ref[...] = lax.fori_loop(0, pl.cdiv(count, block), turn, nothing)

    own = pl.BlockSpec((None, None, length, K), lambda row, head, split: (row, head, split, 0))
    rows = pl.BlockSpec((None, None, None, QUERIES), lambda row, head, split: (row, head, split, 0))
    out, top, total = pl.pallas_call(
        body,
        grid=(B, G, splits),
        in_specs=[
            pl.BlockSpec((None, None, QUERIES, K), lambda row, head, split: (row, head, 0, 0)), own, own,
            pl.BlockSpec((None,), lambda row, head, split: (row,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, QUERIES, K), lambda row, head, split: (row, head, split, 0, 0)), rows, rows
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, G, splits, QUERIES, *rest), jnp.float32) for rest in ((K,), (), ())
        ],
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="decode_attention",
    )(q, k, v, last)  # fmt: skip
    share = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    out = jnp.sum(out * share[..., None], axis=2) / jnp.sum(total * share, axis=2)[..., None]
    return out[:, :, :R]
