"""The teacher with the attention of some layers removed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.partition import batch_spec, on_shards, splits_tokens
from jaxhybrid.model.transformer import Model, embed, final_norm, token_context
from jaxhybrid.model.walk import walk


def ablated_states(model: Model, tokens: jax.Array, segment_ids: jax.Array, softmax: Any, dtype: Any) -> jax.Array:
    """Final hidden states [B,T,D] with zeros in place of what the mixers of layers give that are not `softmax` [L].

    Which layers, is traced, so one program serves all. All layers are of one kind.
    """
    (kind,) = set(model.config.layer_types)
    spec = batch_spec(tokens)

    def mix(normed: jax.Array, mixer: Any, context: TokenContext, kept: jax.Array) -> tuple[jax.Array, None]:
        mixed = mixer(normed, context)[0]
        return jnp.where(kept, mixed, jnp.zeros_like(mixed)), None

    def local(params: Params, tokens: jax.Array, segments: jax.Array, softmax: jax.Array) -> jax.Array:
        own = Model(params, model.config)
        context = token_context(model.config, tokens, segments, None, split=splits_tokens(spec))
        x, _ = walk(params, model.config, embed(own, tokens, dtype), context, mix, extra={kind: softmax})
        return final_norm(own, x)

    return on_shards(local, (model.params, tokens, segment_ids, softmax), (model.specs, spec, spec, P()), spec)
