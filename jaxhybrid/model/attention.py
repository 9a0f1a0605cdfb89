"""Causal softmax attention: the mixer of the teacher and of the layers a hybrid keeps."""

import math

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.layers import TokenContext, exact_dtype, rms_norm
from jaxhybrid.model.params import Params, ParamSpec, normal, ones, zeros
from jaxhybrid.model.partition import per_example
from jaxhybrid.model.rope import rotate

# Queries handled at once by the portable form: bounds its score matrix to [B,H,QUERY_BLOCK,T].
QUERY_BLOCK = 1024
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with every key masked stays finite


def declare(config: ModelConfig) -> Params:
    D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    specs = {
        "q_proj": ParamSpec((D, H, K), ("embed", "heads", "head_dim"), normal()),
        "k_proj": ParamSpec((D, G, K), ("embed", "heads", "head_dim"), normal()),
        "v_proj": ParamSpec((D, G, K), ("embed", "heads", "head_dim"), normal()),
        "o_proj": ParamSpec((H, K, D), ("heads", "head_dim", "embed"), normal()),
    }
    if config.qkv_bias:
        specs |= {
            "q_bias": ParamSpec((H, K), ("heads", "head_dim"), zeros),
            "k_bias": ParamSpec((G, K), ("heads", "head_dim"), zeros),
            "v_bias": ParamSpec((G, K), ("heads", "head_dim"), zeros),
        }
    if config.o_bias:
        specs |= {"o_bias": ParamSpec((D,), ("embed",), zeros)}
    if config.qk_norm:
        specs |= {"q_norm": ParamSpec((K,), ("head_dim",), ones), "k_norm": ParamSpec((K,), ("head_dim",), ones)}
    return specs


def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """An empty key/value cache of `capacity` tokens for one layer."""
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def apply(
    params: Params, config: ModelConfig, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
) -> tuple[jax.Array, Params | None]:
    """Attention output after o_proj [B,T,D], and the cache with this call's keys and values when one was given."""
    q = jnp.einsum("btd,dhk->bthk", x_BTD, params["q_proj"])
    k = jnp.einsum("btd,dgk->btgk", x_BTD, params["k_proj"])
    v = jnp.einsum("btd,dgk->btgk", x_BTD, params["v_proj"])
    if config.qkv_bias:
        q, k, v = q + params["q_bias"], k + params["k_bias"], v + params["v_bias"]
    if config.qk_norm:
        q = rms_norm(q, params["q_norm"], config.norm_eps)
        k = rms_norm(k, params["k_norm"], config.norm_eps)
    q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)

    if state is not None:
        assert context.cache_index is not None
        state = {
            "k": jax.lax.dynamic_update_slice_in_dim(state["k"], k.astype(state["k"].dtype), context.cache_index, 1),
            "v": jax.lax.dynamic_update_slice_in_dim(state["v"], v.astype(state["v"].dtype), context.cache_index, 1),
        }
        out = _attend(
            q,
            state["k"].astype(q.dtype),
            state["v"].astype(q.dtype),
            context.segment_ids,
            context.cache_segment_ids,
            context.cache_index,
        )
    elif context.segment_ids is None:
        out = per_example(lambda q, k, v: causal_attention(q, k, v, None), q, k, v)
    else:
        out = per_example(causal_attention, q, k, v, context.segment_ids)
    y = jnp.einsum("bthk,hkd->btd", out, params["o_proj"])
    return (y + params["o_bias"] if config.o_bias else y), state


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over earlier tokens of the same segment; q [B,T,H,K], k and v [B,T,G,K].

    On NVIDIA GPUs in 16 bits the fused cuDNN kernel; elsewhere blocks of queries, so that memory is linear in T.
    """
    T = q.shape[1]
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        if T % 2:  # which cuDNN refuses; nothing looks at a token after the last
            q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
            segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, 1)))
        mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")[:, :T]
    if T <= QUERY_BLOCK:
        return _attend(q, k, v, segment_ids, segment_ids, jnp.int32(0))
    blocks = math.ceil(T / QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - T

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    segments = None if segment_ids is None else split(segment_ids)

    @jax.checkpoint
    def block(args: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        start, q_block, segment_block = args
        return _attend(q_block, k, v, segment_block, segment_ids, start)

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
