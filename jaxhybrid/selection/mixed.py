"""A model whose layers mix in another way than its mixers alone do."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import Remat
from jaxhybrid.model.partition import batch_spec, on_shards, splits_tokens
from jaxhybrid.model.transformer import Model, embed, final_norm, token_context
from jaxhybrid.model.walk import walk


def mixed_states(
    model: Model,
    tokens: jax.Array,
    segment_ids: jax.Array,
    by_layer: jax.Array,
    mix: Callable[..., Any],
    beside: Callable[[Params, jax.Array], Any],
    dtype: Any,
    remat: Remat = "none",
) -> jax.Array:
    """Final hidden states [B,T,D], with `mix` in each layer as `walk` calls it.

    Args:
        by_layer: [L], traced, so that one program serves all values.
        beside: of the model's parameters and `by_layer`, as a device has them: the `extra` of `walk`.
    """
    spec = batch_spec(tokens)

    def local(params: Params, tokens: jax.Array, segments: jax.Array, by_layer: jax.Array) -> jax.Array:
        own = Model(params, model.config)
        context = token_context(model.config, tokens, segments, None, split=splits_tokens(spec))
        extra = beside(params, by_layer)
        x, _ = walk(params, model.config, embed(own, tokens, dtype), context, mix, extra=extra, remat=remat)
        return final_norm(own, x)

    return on_shards(local, (model.params, tokens, segment_ids, by_layer), (model.specs, spec, spec, P()), spec)
