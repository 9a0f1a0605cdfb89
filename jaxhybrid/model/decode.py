"""Running a model token by token: a key/value cache for softmax layers, a constant-size state for linear ones."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import ModelConfig, layers_of_kind
from jaxhybrid.model.layers import TokenContext, rms_norm, segment_positions
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.params import Params, cast_params
from jaxhybrid.model.rope import rotary_tables
from jaxhybrid.model.transformer import (
    add_mlp,
    declare,
    embed,
    final_norm,
    head_matrix,
    layer_runs,
    take_layers,
)

DecodeState = dict[str, Any]


def initial_decode_state(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> DecodeState:
    """An empty state with room for `capacity` tokens per row (prompt and generated together)."""
    mixers = {}
    for kind in dict.fromkeys(config.layer_types):
        count = len(layers_of_kind(config.layer_types, kind))
        layer = MIXERS[kind].initial_state(config, batch, capacity, dtype)
        mixers[kind] = jax.tree.map(lambda x, count=count: jnp.broadcast_to(x, (count, *x.shape)), layer)
    return {
        "mixers": mixers,
        "segment_ids": jnp.zeros((batch, capacity), jnp.int32),
        "position": jnp.zeros((batch,), jnp.int32),  # rotary position of each row's next token
        "index": jnp.zeros((), jnp.int32),  # cache slot of the next token, the same for all rows
    }


def decode(
    params: Params,
    config: ModelConfig,
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
    params = cast_params(params, declare(config), dtype)
    segments = jnp.ones_like(tokens_BT) if mask_BT is None else mask_BT.astype(jnp.int32)
    cached_segments = jax.lax.dynamic_update_slice_in_dim(state["segment_ids"], segments, state["index"], 1)
    positions = state["position"][:, None] + segment_positions(segments)
    context = TokenContext(segments, *rotary_tables(config, positions), cached_segments, state["index"])
    x = embed(params, tokens_BT)
    states: dict[str, list[Params]] = {kind: [] for kind in state["mixers"]}

    for run in layer_runs(config.layer_types):

        def layer(x: jax.Array, scanned: Any, kind: str = run.kind) -> tuple[jax.Array, Params]:
            block_params, mixer_params, mixer_state = scanned
            normed = rms_norm(x, block_params["input_norm"], config.norm_eps)
            mixed, new_state = MIXERS[kind].apply(mixer_params, config, normed, context, mixer_state)
            return add_mlp(block_params, config, x + mixed), new_state

        rows = run.first, run.first + run.stop - run.start
        scanned = (
            take_layers(params["blocks"], run.start, run.stop),
            take_layers(params["mixers"][run.kind], *rows),
            take_layers(state["mixers"][run.kind], *rows),
        )
        x, new_states = jax.lax.scan(layer, x, scanned)
        states[run.kind].append(new_states)

    hidden = final_norm(params, config, x[:, -1])
    logits = jnp.einsum("bd,ds->bs", hidden, head_matrix(params, config), preferred_element_type=jnp.float32)
    return logits, {
        "mixers": {kind: jax.tree.map(lambda *runs: jnp.concatenate(runs), *runs) for kind, runs in states.items()},
        "segment_ids": cached_segments,
        "position": positions[:, -1] + 1,
        "index": state["index"] + tokens_BT.shape[1],
    }
