"""Running a model token by token: a key/value cache for softmax layers, a constant-size state for linear ones."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import ModelConfig, layers_of_kind
from jaxhybrid.model.layers import TokenContext, segment_positions
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import gather, per_example, split_rows
from jaxhybrid.model.rope import rotary_tables
from jaxhybrid.model.transformer import Model, embed, final_norm
from jaxhybrid.model.walk import walk

DecodeState = dict[str, Any]


def initial_decode_state(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> DecodeState:
    """An empty state with room for `capacity` tokens per row (prompt and generated together). More are not refused:
    the last slots of the softmax layers would be overwritten."""
    mixers = {}
    for kind in dict.fromkeys(config.layer_types):
        count = len(layers_of_kind(config.layer_types, kind))
        layer = MIXERS[kind].initial_state(config, batch, capacity, dtype)
        layers = jax.tree.map(lambda x, count=count: jnp.broadcast_to(x, (count, *x.shape)), layer)
        mixers[kind] = jax.tree.map(lambda x: split_rows(x, axis=1), layers)
    return {
        "mixers": mixers,
        "segment_ids": split_rows(jnp.zeros((batch, capacity), jnp.int32)),
        "position": split_rows(jnp.zeros((batch,), jnp.int32)),  # rotary position of each row's next token
        "index": jnp.zeros((), jnp.int32),  # cache slot of the next token, the same for all rows
    }


def decode(
    model: Model,
    tokens_BT: jax.Array,
    state: DecodeState,
    mask_BT: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, DecodeState]:
    """Logits of the last token [B,S] float32, and the state after these tokens.

    The whole prompt at once (prefill), or one or a few tokens later on.

    Args:
        mask_BT: 1 for tokens, 0 for padding. Padding is on the left, so it can occur in the first call only.
    """
    model = model.cast(dtype)
    segments = jnp.ones_like(tokens_BT) if mask_BT is None else mask_BT.astype(jnp.int32)
    cached_segments = jax.lax.dynamic_update_slice_in_dim(state["segment_ids"], segments, state["index"], 1)
    positions = state["position"][:, None] + per_example(segment_positions, segments)
    context = TokenContext(segments, *rotary_tables(model.config, positions), cached_segments, state["index"])

    def mix(normed: jax.Array, mixer: Any, context: TokenContext, layer_state: Any) -> tuple[jax.Array, Any]:
        return mixer(normed, context, layer_state)

    x = embed(model, tokens_BT)
    x, mixers = walk(model.params, model.config, x, context, mix, extra=state["mixers"], by_run=True)
    hidden = final_norm(model, x[:, -1])
    logits = jnp.einsum("bd,ds->bs", hidden, gather(model.head), preferred_element_type=jnp.float32)
    return logits, {
        "mixers": mixers,
        "segment_ids": cached_segments,
        "position": positions[:, -1] + 1,
        "index": state["index"] + tokens_BT.shape[1],
    }
