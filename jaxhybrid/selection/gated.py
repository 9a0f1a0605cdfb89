"""The aligned student with each layer between softmax and linear: a share of its attention, the rest its mixer."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.losses import CHUNK_TOKENS, linear_kl
from jaxhybrid.model.blueprint import Params, bind, variables
from jaxhybrid.model.config import FULL_ATTENTION, Remat
from jaxhybrid.model.head import Head
from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import gather
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.mixed import mixed_states
from jaxhybrid.stages.batch import Batch


def gated_states(
    student: Model, gates: jax.Array, tokens: jax.Array, segment_ids: jax.Array, dtype: Any, remat: Remat = "none"
) -> jax.Array:
    """Final hidden states [B,T,D]: layer l mixes by gates[l] x its attention + (1 - gates[l]) x its linear mixer.

    The mixed stream goes on to the next layer. `student` is linear, with the attention of every layer beside it.
    """
    (kind,) = set(student.config.layer_types)
    config, softmax = student.config, MIXERS[FULL_ATTENTION]

    def mix(normed: jax.Array, linear: Any, context: TokenContext, extra: Any) -> tuple[jax.Array, None]:
        gate, rows = extra
        attention = bind(softmax, config, gather(variables(softmax, config), rows, dtype))
        gate = gate.astype(dtype)
        return gate * attention(normed, context)[0] + (1 - gate) * linear(normed, context)[0], None

    def beside(params: Params, gates: jax.Array) -> Any:
        return {kind: (gates, params["mixers"][FULL_ATTENTION])}

    return mixed_states(student, tokens, segment_ids, gates, mix, beside, dtype, remat)


def gated_kl(
    gates: jax.Array,
    student: Model,
    batch: Batch,
    teacher_head: Head,
    *,
    dtype: Any = jnp.bfloat16,
    chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
    """KL(teacher || gated student), a mean over the tokens that count of a batch as `MaskedStudent` holds it."""
    hidden = gated_states(student, gates, batch["tokens"], batch["segment_ids"], dtype, remat="block")
    heads = student.head, teacher_head.astype(dtype)
    states = batch["teacher_hidden"].astype(dtype)
    kl = linear_kl(hidden, heads[0], states, heads[1], batch["counted"], chunk_tokens=chunk_tokens)
    return kl / jnp.maximum(batch["count"], 1.0)
