"""Causal softmax attention: the mixer of the teacher and of the layers a hybrid keeps."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import Places
from jaxhybrid_kernels.gpu.attention_token import attention_token, attention_token_refusal
from jaxhybrid_kernels.numerics import decodes_by_kernels, on_nvidia

from jaxhybrid.model.balanced import balanced
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.layers import Linear, TokenContext, query_key_norms
from jaxhybrid.model.partition import joined, own_heads
from jaxhybrid.model.rope import rotate
from jaxhybrid.model.softmax import Window, causal_attention, decode_attention


class Attention(nnx.Module):
    """Grouped-query softmax attention with rotary embedding, and a teacher's biases and norms where it has them."""

    kind = FULL_ATTENTION
    joins = True  # see `LinearMixer`
    state_heads: ClassVar[dict[str, int | None]] = {"k": 1, "v": 1}  # the axis of heads in the state of one layer

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(rngs, (D, heads, K), ("embed", axis, "head_dim"), bias=config.qkv_bias)
            for heads, axis in ((H, "heads"), (G, "kv_heads"), (G, "kv_heads"))
        )
        self.o_proj = Linear(rngs, (H, K, D), ("heads", "head_dim", "embed"), bias=config.o_bias, inputs=2)
        if config.qk_norm:
            self.q_norm, self.k_norm = query_key_norms(config, rngs, G)
        self.window = None if config.window is None else config.window.size
        self.scale = None if config.attention_scale is None else config.attention_scale * K**0.5
        self.cap = config.attention_cap
        self.rope, self.scales_by_length = config.softmax.rope, config.softmax.length_scale is not None

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """An empty key/value cache of `capacity` tokens for one layer, of this device's heads: [B,G,M,K].

        Heads before tokens, so that a head's keys lie together, as the matrix product of a decoding step wants them.
        """
        shape = (batch, own_heads(config.num_kv_heads), capacity, config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        """Attention output after o_proj [B,T,D], and the cache with this call's keys and values when one was given."""
        q, k, v = self.projected(x_BTD, context)
        if state is None:
            return self.o_proj(self.over_row(q, k, v, context)), None
        assert context.cache_index is not None
        index, new, window = context.cache_index, {"k": k, "v": v}, self.sees(context)
        if index.ndim:  # one token a row, each at a place of its own
            state = written(state, new, index)
            out = decode_attention(q[:, 0], state["k"], state["v"], index, window, self.cap)[:, None]
        else:
            state = {
                name: jax.lax.dynamic_update_slice_in_dim(cache, jnp.moveaxis(new[name], 1, 2), index, 2)
                for name, cache in state.items()
            }
            keys, values = (jnp.moveaxis(state[name], 2, 1) for name in ("k", "v"))
            out = causal_attention(q, keys, values, None, first_query=index, window=window, cap=self.cap)
        return self.o_proj(out), state

    def takes_token(self, projections_BO: jax.Array, context: TokenContext, state: Params) -> bool:
        """Whether `token` serves: where a kernel does, which knows of rotation only."""
        is_plain = self.rope and not self.scales_by_length and not hasattr(self, "q_norm")
        sees_all = self.window is None and self.cap is None
        if not (is_plain and sees_all and decodes_by_kernels() and on_nvidia()):
            return False
        heads, rotation = self.o_proj.kernel.shape[0], (context.cos, context.sin)
        return attention_token_refusal(projections_BO, rotation, state["k"], heads) is None

    def token(
        self,
        projections_BO: jax.Array,
        firsts: dict[str, int],
        x_BTD: jax.Array,
        context: TokenContext,
        state: Params,
        then: Sequence[jax.Array],
    ) -> tuple[jax.Array, Params]:
        """`__call__` of one token up to o_proj [B,1,H*K], by kernels of its own; as linear mixers have it."""
        assert context.cache_index is not None
        K = state["k"].shape[-1]
        places = Places(*(firsts[name] // K for name in ("q_proj", "k_proj", "v_proj")))
        out, k, v = attention_token(
            projections_BO, places, (context.cos[:, 0], context.sin[:, 0]), state["k"], state["v"], context.cache_index,
            heads=self.o_proj.kernel.shape[0], scale=K**-0.5 * (1 if self.scale is None else self.scale),
            dtype=x_BTD.dtype, then=then,
        )  # fmt: skip
        return out[:, None], {"k": k, "v": v}

    def projected(self, x_BTD: jax.Array, context: TokenContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = project(self, x_BTD, context, self.rope)
        if self.scales_by_length:
            assert context.query_scale is not None, "the context is of another model"
            q = (q * context.query_scale[..., None, None]).astype(q.dtype)
        if self.scale is not None:  # attention divides by sqrt(K)
            q = q * self.scale
        return q, k, v

    def sees(self, context: TokenContext) -> Window | None:
        """The keys that a query sees, if not all before it."""
        return None if self.window is None else Window(self.window, context.slides)

    def over_row(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        context: TokenContext,
        attend: Callable[..., jax.Array] = causal_attention,
    ) -> jax.Array:
        """Attention without a state [B,T,H,K], or what else `attend` makes of its arguments."""
        if context.first_token is not None:  # the keys of the whole row, for the queries of a part of it
            k, v = (joined(x, 1, "context") for x in (k, v))
        window = self.sees(context)

        def of_queries(q: jax.Array, first: jax.Array | None) -> jax.Array:
            return attend(
                q, k, v, context.segment_ids, key_segment_ids=context.key_segment_ids, first_query=first,
                window=window, cap=self.cap,
            )  # fmt: skip

        everywhere_alike = window is not None and window.slides is True
        if context.first_token is None or everywhere_alike or q.shape[1] % 2:
            return of_queries(q, context.first_token)
        return balanced(q, of_queries)


def written(caches: Params, new: Params, index_B: jax.Array) -> Params:
    """Caches [B,G,M,K] with one more token [B,1,G,K] in each row, at a place of its own."""
    # Indexed by head, too: XLA for GPUs transposes what is scattered into until its indexed axes come first.
    rows, heads = (jnp.arange(size, dtype=jnp.int32) for size in caches["k"].shape[:2])
    at = rows[:, None], heads, index_B[:, None]
    return {name: cache.at[at].set(new[name][:, 0], mode="drop", unique_indices=True) for name, cache in caches.items()}


def project(mixer: Any, x_BTD: jax.Array, context: TokenContext, rope: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v [B,T,heads,K] by the mixer's projections, its query and key norms if it has them, and rotation."""
    q, k, v = mixer.q_proj(x_BTD), mixer.k_proj(x_BTD), mixer.v_proj(x_BTD)
    if hasattr(mixer, "q_norm"):
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    if rope:
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
    return q, k, v
