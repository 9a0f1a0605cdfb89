"""Softmax attention of queries that see a range of the keys up to their own, by Hopper kernels, with its gradient.

Blocks of keys that no query of a block sees are neither loaded nor computed, so that short documents in long rows cost
what they would by themselves.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxhybrid_kernels.gpu.attention_plan import ROWS, AttentionPlan, Blocks
from jaxhybrid_kernels.gpu.block_ranges import key_blocks_seen, query_blocks_seeing
from jaxhybrid_kernels.gpu.softmax_forward import forward_kernel
from jaxhybrid_kernels.gpu.softmax_key_gradients import key_gradients_kernel
from jaxhybrid_kernels.gpu.softmax_query_gradient import query_gradient_kernel
from jaxhybrid_kernels.numerics import hopper_refusal, target_platform

WIDTHS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
# Names of what the gradient needs: q, k, v, the output, and the logarithm of each query's sum.
KEPT = tuple(f"attention_{name}" for name in ("queries", "keys", "values", "output", "logsumexp"))
WHOLE = 128  # queries and keys are padded to a multiple of this: it holds any block
# On an H200, see kernels/NOTES.md.
FORWARD = Blocks(columns=128, stages=2)
QUERY = Blocks(columns=64, stages=3)
KEY = Blocks(columns=64, stages=2)


def softmax_attention_refusal(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernels cannot take q [B,Q,Hq,D] and k [B,M,Hk,D], naming the value in the way; None if they can."""
    (Hq, D), Hk = q.shape[2:], k.shape[2]
    if refusal := hopper_refusal("softmax_attention"):
        return refusal
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        return f"q and k have dtypes {q.dtype} and {k.dtype}, the kernels take bfloat16 or float16, the same of both."
    if D not in WIDTHS:
        return f"heads have {D} channels, the kernels take {' or '.join(map(str, WIDTHS))}."
    if Hq % Hk:
        return f"{Hk} key heads do not divide {Hq} query heads."
    return None


def make_plan(q: jax.Array, k: jax.Array) -> AttentionPlan:
    """Of q [B,Q,Hq,D] and k [B,M,Hk,D]."""
    (B, Q, Hq, D), (M, Hk) = q.shape, k.shape[1:3]
    whole = Q + -Q % WHOLE, M + -M % WHOLE
    return AttentionPlan(B, *whole, Hq, Hk, D, q.dtype, FORWARD, QUERY, KEY, target_platform() == "cpu")


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, first: jax.Array, plan: AttentionPlan
) -> jax.Array:
    """softmax(q k' / sqrt(D)) v of queries at first, first+1, ..., each over the keys from `starts` to its own.

    Args:
        q, k, v: [B,Q,Hq,D] and [B,M,Hk,D], Hk divides Hq; see `softmax_attention_refusal`.
        starts: [B,Q] int32: the first key that each query sees, at most its own; it never falls along a row.
        first: int32, at most M - Q.

    Inside `jax.shard_map` all of them vary along the same manual axes. Where `jax.checkpoint` keeps the names KEPT, it
    does not run the forward kernel again, and of what made q, k and v only what its own gradient needs (norms of heads
    need what they were given). Returns [B,Q,Hq,D] in q's dtype.
    """
    Q, after_q, after_k = q.shape[1], plan.Q - q.shape[1], plan.M - k.shape[1]
    if after_q:  # they see what the last query sees, and more
        q, starts = _padded(q, after_q), jnp.pad(starts, ((0, 0), (0, after_q)), mode="edge")
    if after_k:
        k, v = _padded(k, after_k), _padded(v, after_k)
    return _attention(q, k, v, starts, first, plan)[:, :Q]


def _padded(x: jax.Array, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, after), (0, 0), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: Any, k: Any, v: Any, starts: Any, first: Any, plan: AttentionPlan) -> jax.Array:
    return _forward(q, k, v, starts, first, plan)[0]


def _forward(q: Any, k: Any, v: Any, starts: Any, first: Any, plan: AttentionPlan) -> Any:
    q, k, v = map(checkpoint_name, (q, k, v), KEPT[:3])
    seen = key_blocks_seen(starts, first, plan.M, plan.rows, plan.forward.columns)
    out, logsumexp = map(checkpoint_name, forward_kernel(plan)(q, k, v, starts, seen), KEPT[3:])
    return out, (q, k, v, starts, first, out, logsumexp)


def _backward(plan: AttentionPlan, saved: Any, d_out: jax.Array) -> Any:
    q, k, v, starts, first, out, logsumexp = saved
    dots = jnp.einsum("bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32)
    operands = q, k, v, d_out, logsumexp, dots, starts
    seen = key_blocks_seen(starts, first, plan.M, plan.rows, plan.query.columns)
    (d_q,) = query_gradient_kernel(plan)(*operands, seen)
    seeing = query_blocks_seeing(starts, first, plan.M, queries=plan.key.columns, keys=ROWS)
    d_k, d_v = key_gradients_kernel(plan)(*operands, seeing)
    return d_q, d_k, d_v, None, None


_attention.defvjp(_forward, _backward)
