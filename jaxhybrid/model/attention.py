"""Causal softmax attention: the mixer of the teacher and of the layers a hybrid keeps."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.layers import Linear, RMSNorm, TokenContext, exact_dtype
from jaxhybrid.model.partition import joined, own_heads
from jaxhybrid.model.rope import rotate

# Queries handled at once by the portable form: bounds its score matrix to [B,H,QUERY_BLOCK,T].
QUERY_BLOCK = 1024
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with every key masked stays finite


class Attention(nnx.Module):
    """Grouped-query softmax attention with rotary embedding, and a teacher's biases and norms where it has them."""

    kind = FULL_ATTENTION
    state_heads: ClassVar[dict[str, int]] = {"k": 2, "v": 2}  # the axis of heads in the state of one layer

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(rngs, (D, heads, K), ("embed", axis, "head_dim"), bias=config.qkv_bias)
            for heads, axis in ((H, "heads"), (G, "kv_heads"), (G, "kv_heads"))
        )
        self.o_proj = Linear(rngs, (H, K, D), ("heads", "head_dim", "embed"), bias=config.o_bias, inputs=2)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(rngs, K, "head_dim", config.norm_eps) for _ in range(2))

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """An empty key/value cache of `capacity` tokens for one layer, of this device's heads."""
        shape = (batch, capacity, own_heads(config.num_kv_heads), config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        """Attention output after o_proj [B,T,D], and the cache with this call's keys and values when one was given."""
        q, k, v = project(self, x_BTD, context)
        if state is None:
            if context.first_token is not None:  # the keys of the whole row, for the queries of a part of it
                k, v = (joined(x, 1, "context") for x in (k, v))
            out = causal_attention(
                q, k, v, context.segment_ids,
                key_segment_ids=context.key_segment_ids, first_query=context.first_token,
            )  # fmt: skip
            return self.o_proj(out), None
        assert context.cache_index is not None
        index = context.cache_index
        state = {
            name: jax.lax.dynamic_update_slice_in_dim(state[name], new.astype(state[name].dtype), index, 1)
            for name, new in (("k", k), ("v", v))
        }
        out = _attend(
            q,
            state["k"].astype(q.dtype),
            state["v"].astype(q.dtype),
            context.segment_ids,
            context.key_segment_ids,
            index,
        )
        return self.o_proj(out), state


def project(
    mixer: Any, x_BTD: jax.Array, context: TokenContext, rope: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v [B,T,heads,K] by the mixer's projections, its query and key norms if it has them, and rotation."""
    q, k, v = mixer.q_proj(x_BTD), mixer.k_proj(x_BTD), mixer.v_proj(x_BTD)
    if hasattr(mixer, "q_norm"):
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    if rope:
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
    return q, k, v


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    key_segment_ids: jax.Array | None = None,
    first_query: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over earlier tokens of the same segment; q [B,T,H,K], k and v [B,T,G,K].

    On NVIDIA GPUs in 16 bits the fused cuDNN kernel; elsewhere blocks of queries, so that memory is linear in T.
    With `first_query`, a scalar, the queries are those from there on of a longer row, whose keys are all here: k and v
    [B,M,G,K], key_segment_ids [B,M].
    """
    T = q.shape[1]
    if first_query is None:
        key_segment_ids, first_query = segment_ids, jnp.int32(0)
    elif segment_ids is not None:
        assert key_segment_ids is not None
    if k.shape[1] == T and jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        if T % 2:  # which cuDNN refuses; nothing looks at a token after the last
            q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
            segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, 1)))
        mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")[:, :T]
    if T <= QUERY_BLOCK:
        return _attend(q, k, v, segment_ids, key_segment_ids, first_query)
    blocks = math.ceil(T / QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - T

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    segments = None if segment_ids is None else split(segment_ids)

    @jax.checkpoint
    def block(args: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        start, q_block, segment_block = args
        return _attend(q_block, k, v, segment_block, key_segment_ids, first_query + start)

    out = jax.lax.map(block, (jnp.arange(blocks) * QUERY_BLOCK, split(q), segments))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], blocks * QUERY_BLOCK, *q.shape[2:])[:, :T]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    first_query: jax.Array,
) -> jax.Array:
    """q [B,Q,H,K] are tokens first_query, first_query+1, ... of the keys' axis; scores and softmax in float32."""
    B, Q, H, K = q.shape
    M, G = k.shape[1], k.shape[2]
    scores = jnp.einsum(
        "bqgrk,bmgk->bgrqm", q.reshape(B, Q, G, H // G, K), k, preferred_element_type=exact_dtype(q.dtype)
    )
    visible = (jnp.arange(M)[None, :] <= first_query + jnp.arange(Q)[:, None])[None]
    if query_segments is not None and key_segments is not None:
        visible = visible & (query_segments[:, :, None] == key_segments[:, None, :])
    scores = jnp.where(visible[:, None, None], scores * K**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrqm,bmgk->bqgrk", weights, v).reshape(B, Q, H, K)
