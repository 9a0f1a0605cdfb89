"""Causal softmax attention: the mixer of the teacher and of the layers a hybrid keeps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.layers import Linear, RMSNorm, TokenContext
from jaxhybrid.model.partition import per_example
from jaxhybrid.model.rope import rotate
from jaxhybrid.model.softmax import cached_attention, causal_attention


class Attention(nnx.Module):
    """Grouped-query softmax attention with rotary embedding, and a teacher's biases and norms where it has them."""

    kind = FULL_ATTENTION

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(rngs, (D, heads, K), ("embed", "heads", "head_dim"), bias=config.qkv_bias) for heads in (H, G, G)
        )
        self.o_proj = Linear(rngs, (H, K, D), ("heads", "head_dim", "embed"), bias=config.o_bias, inputs=2)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(rngs, K, "head_dim", config.norm_eps) for _ in range(2))

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """An empty key/value cache of `capacity` tokens for one layer."""
        shape = (batch, capacity, config.num_kv_heads, config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        """Attention output after o_proj [B,T,D], and the cache with this call's keys and values when one was given."""
        q, k, v = project(self, x_BTD, context)
        if state is None:
            return self.o_proj(per_example(causal_attention, q, k, v, context.segment_ids)), None
        assert context.cache_index is not None
        index = context.cache_index
        state = {
            name: jax.lax.dynamic_update_slice_in_dim(state[name], new.astype(state[name].dtype), index, 1)
            for name, new in (("k", k), ("v", v))
        }
        out = per_example(
            cached_attention, q, state["k"].astype(q.dtype), state["v"].astype(q.dtype),
            context.segment_ids, context.cache_segment_ids, whole=(index,),
        )  # fmt: skip
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
