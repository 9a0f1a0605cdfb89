"""The teacher with the attention of some layers removed."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.mixed import mixed_states


def ablated_states(model: Model, tokens: jax.Array, segment_ids: jax.Array, softmax: Any, dtype: Any) -> jax.Array:
    """Final hidden states [B,T,D] with zeros in place of what the mixers of layers give that are not `softmax` [L].

    Which layers, is traced, so one program serves all. All layers are of one kind.
    """
    (kind,) = set(model.config.layer_types)

    def mix(normed: jax.Array, mixer: Any, context: TokenContext, kept: jax.Array) -> tuple[jax.Array, None]:
        mixed = mixer(normed, context)[0]
        return jnp.where(kept, mixed, jnp.zeros_like(mixed)), None

    return mixed_states(model, tokens, segment_ids, softmax, mix, lambda _, kept: {kind: kept}, dtype)
