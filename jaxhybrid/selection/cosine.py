"""How much each block of a model changes its input."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.partition import BATCH_AXES, batch_spec, on_shards, splits_tokens, total
from jaxhybrid.model.transformer import Model, embed, mix_alone, token_context
from jaxhybrid.model.walk import walk
from jaxhybrid.stages.batch import Batch, count_tokens, token_mask


def block_cosines(model: Model, batch: Batch, dtype: Any = jnp.bfloat16) -> jax.Array:
    """[L]: mean over tokens of the cosine of a block's input and output. All layers are of one kind."""
    (kind,) = set(model.config.layer_types)
    spec = batch_spec(batch["tokens"])

    def local(params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        mask = token_mask(segments)

        def watch(before: jax.Array, after: jax.Array) -> jax.Array:
            x, y = before.astype(jnp.float32), after.astype(jnp.float32)
            norms = jnp.sum(x * x, -1) * jnp.sum(y * y, -1)
            return total(jnp.sum(mask * jnp.sum(x * y, -1) / jnp.sqrt(norms + 1e-12)), *BATCH_AXES)

        context = token_context(model.config, tokens, segments, None, split=splits_tokens(spec))
        x = embed(Model(params, model.config), tokens, dtype)
        return walk(params, model.config, x, context, mix_alone, watch=watch)[1][kind]

    arguments = model.params, batch["tokens"], batch["segment_ids"]
    return on_shards(local, arguments, (model.specs, spec, spec), P()) / count_tokens(batch)
