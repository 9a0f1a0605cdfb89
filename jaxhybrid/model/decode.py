"""Running a model token by token: a key/value cache for softmax layers, a constant-size state for linear ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig, layers_of_kind
from jaxhybrid.model.head import gathered, own_columns, whole
from jaxhybrid.model.layers import TokenContext, segment_positions
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import BATCH_AXES, active_mesh, differing, head_spec, mesh_axes, on_shards, row_devices
from jaxhybrid.model.rope import rotary_tables
from jaxhybrid.model.transformer import Model, embed, final_norm
from jaxhybrid.model.walk import walk

DecodeState = dict[str, Any]


def initial_decode_state(config: ModelConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> DecodeState:
    """An empty state with room for `capacity` tokens per row (prompt and generated together). More are not refused:
    the last slots of the softmax layers would be overwritten.

    On a mesh the rows are split over `data`, `fsdp` and `context`, and heads over `tensor`.
    """
    mesh = active_mesh()
    devices = 1 if mesh is None else row_devices(mesh)
    if batch % devices:
        raise TopologyError(f"{batch} rows do not divide over the {devices} devices of {BATCH_AXES}; add rows.")
    specs = _state_specs(config)

    def local() -> DecodeState:
        mixers = {}
        for kind in dict.fromkeys(config.layer_types):
            count = len(layers_of_kind(config.layer_types, kind))
            layer = MIXERS[kind].initial_state(config, batch // devices, capacity, dtype)
            mixers[kind] = jax.tree.map(lambda x, count=count: jnp.broadcast_to(x, (count, *x.shape)), layer)
        state = {
            "mixers": mixers,
            "segment_ids": jnp.zeros((batch // devices, capacity), jnp.int32),
            "position": jnp.zeros((batch // devices,), jnp.int32),  # rotary position of each row's next token
            "index": jnp.zeros((), jnp.int32),  # cache slot of the next token, the same for all rows
        }
        return jax.tree.map(lambda spec, x: differing(x, *mesh_axes(spec)), specs, state)

    return on_shards(local, (), (), specs)


def _state_specs(config: ModelConfig) -> DecodeState:
    def of_mixer(kind: str) -> dict[str, P]:
        mixer = MIXERS[kind]
        names = jax.eval_shape(lambda: mixer.initial_state(config, 1, 1, jnp.float32))
        return {name: P(None, BATCH_AXES, *(None,) * (mixer.state_heads[name] - 1), "tensor") for name in names}

    mixers = {kind: of_mixer(kind) for kind in dict.fromkeys(config.layer_types)}
    return {"mixers": mixers, "segment_ids": P(BATCH_AXES), "position": P(BATCH_AXES), "index": P()}


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
    rows, states = P(BATCH_AXES), _state_specs(model.config)
    arguments = model.params, model.head, tokens_BT, state, mask_BT
    specs = model.specs, head_spec(*model.head.shape), rows, states, rows
    return on_shards(partial(_decode, model.config, dtype), arguments, specs, (rows, states))


def _decode(
    config: ModelConfig, dtype: Any, params: Params, head: jax.Array, tokens: jax.Array, state: DecodeState, mask: Any
) -> tuple[jax.Array, DecodeState]:
    """`decode` of this device's rows."""
    model = Model(params, config)
    segments = jnp.ones_like(tokens) if mask is None else mask.astype(jnp.int32)
    cached_segments = jax.lax.dynamic_update_slice_in_dim(state["segment_ids"], segments, state["index"], 1)
    positions = state["position"][:, None] + segment_positions(segments)
    context = TokenContext(segments, *rotary_tables(config, positions), cached_segments, state["index"])

    def mix(normed: jax.Array, mixer: Any, context: TokenContext, layer_state: Any) -> tuple[jax.Array, Any]:
        return mixer(normed, context, layer_state)

    x = embed(model, tokens, dtype)
    x, mixers = walk(params, config, x, context, mix, extra=state["mixers"], by_run=True)
    columns = own_columns(head, config.vocab_size, dtype)
    logits = columns.logits(gathered(final_norm(model, x[:, -1])), config.vocab_size)
    return whole(logits, config.vocab_size), {
        "mixers": mixers,
        "segment_ids": cached_segments,
        "position": positions[:, -1] + 1,
        "index": state["index"] + tokens.shape[1],
    }
