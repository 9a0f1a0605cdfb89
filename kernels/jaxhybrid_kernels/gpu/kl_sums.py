"""Largest logits and sums of exponentials of two models, in one pass over both (Triton): a program for each token.

A lane keeps a largest logit and sums of its own, from some blocks of the row to the next ones, so that nothing passes
between lanes before the end of the row. Several blocks are asked for at once, and share what follows from a new largest
logit.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxhybrid_kernels.gpu.launch import unmarked
from jaxhybrid_kernels.numerics import NOTHING

BLOCK = 1024
AT_ONCE = 4
WARPS = 8


def kl_sums_kernel(
    logits: jax.Array, teacher: jax.Array, *, block: int = BLOCK, at_once: int = AT_ONCE, warps: int = WARPS,
    interpret: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """Of two float32 arrays [N,S]: what `kl_sums` gives, each [N]."""
    N, S = logits.shape

    def body(q_ref: Any, p_ref: Any, *out_refs: Any) -> None:
        row, lane = pl.program_id(0), jnp.arange(block)

        def turn(number: jax.Array, carry: Any) -> Any:
            begins = [(number * at_once + part) * block for part in range(at_once)]

            def read(ref: Any) -> list[jax.Array]:
                return [
                    unmarked(plt.load(ref.at[row, pl.ds(begin, block)], mask=begin + lane < S, other=NOTHING))
                    for begin in begins
                ]

            qs, ps = read(q_ref), read(p_ref)
            (q_top, q_sum), (p_top, p_sum, difference) = carry
            q_new, p_new = (reduce(jnp.maximum, logits, top) for logits, top in ((qs, q_top), (ps, p_top)))
            kept = jnp.exp(p_top - p_new)
            q_sum, p_sum, difference = q_sum * jnp.exp(q_top - q_new), p_sum * kept, difference * kept
            for q, p in zip(qs, ps):
                weight = jnp.exp(p - p_new)
                q_sum, p_sum = q_sum + jnp.exp(q - q_new), p_sum + weight
                difference += weight * (p - q)
            return (q_new, q_sum), (p_new, p_sum, difference)

        top, zero = jnp.full((block,), NOTHING, jnp.float32), jnp.zeros((block,), jnp.float32)
        found = lax.fori_loop(0, pl.cdiv(S, block * at_once), turn, ((top, zero), (top, zero, zero)))
        for (lane_top, *sums), refs in zip(found, (out_refs[:2], out_refs[2:])):
            refs[0][row] = whole = jnp.max(lane_top)
            # A lane that saw no logit has counted some.
            share = jnp.where(lane_top > NOTHING, jnp.exp(lane_top - whole), 0.0)
            for ref, own in zip(refs[1:], sums):
                ref[row] = jnp.sum(own * share)

    return pl.pallas_call(
        body,
        grid=(N,),
        out_shape=[jax.ShapeDtypeStruct((N,), jnp.float32, manual_axis_type=jax.typeof(logits).manual_axis_type)] * 5,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name="kl_sums",
    )(logits, teacher)
