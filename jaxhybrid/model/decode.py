"""Going on from a state: a key/value cache for softmax layers, a memory of constant size for linear ones.

A prompt goes through chunk by chunk and layer by layer, with one program for each kind of layer (`prefill_layer`);
then one token of every row goes through all layers in one program (`decode_token`). Each layer's weights and state are
arrays of their own, so that programs read them where they lie and write a state in place: a row of a stack is copied.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.blueprint import Exact, Params, is_variable, variables
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.head import Columns, Head, TiedColumns, gathered, own_columns, whole
from jaxhybrid.model.joined import join, joined_layer, may_join
from jaxhybrid.model.layers import Block, LayerView, TokenContext, layer_views
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import (
    BATCH_AXES,
    active_mesh,
    active_specs,
    differing,
    head_spec,
    mesh_axes,
    on_shards,
    row_devices,
)
from jaxhybrid.model.rope import rotary_tables
from jaxhybrid.model.transformer import Ends, Model, embed, final_norm
from jaxhybrid.model.walk import one_layer

LayerStates = tuple[Params, ...]
ROWS = P(BATCH_AXES)  # of arrays with a row for each text


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unstacked:
    """A model with the weights of each layer by themselves, in the compute dtype."""

    ends: Params  # embed, final_norm, head
    layers: tuple[Params, ...]  # block and mixer, or what `join` makes of them
    config: ModelConfig = field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        return self.ends["embed"]["embedding"].dtype

    @property
    def model(self) -> Model:
        """What stands before and after the layers."""
        return Model(self.ends, self.config)

    @property
    def specs(self) -> Any:
        """How ends and layers are split over the active mesh."""
        if active_mesh() is None:
            return P(), P()
        layers = tuple(layer_specs(self.config, kind) for kind in self.config.layer_types)
        return active_specs(variables(Ends, self.config)), layers


def unstack(model: Model, dtype: Any, *, consume: bool = False) -> Unstacked:
    """The weights of each layer as arrays of their own, in `dtype`; what is declared `Exact` stays float32.

    Without a mesh, those that a layer reads together are joined where kernels of decoding want it (`may_join`).

    Args:
        consume: delete the stacks of `model` on the way, so that at no time more than one weight lies there twice.
    """
    declared = model.declared

    def dtype_of(variable: Any, x: jax.Array) -> Any:
        return x.dtype if isinstance(variable, Exact) else jnp.dtype(dtype)

    def rows(variable: Any, stack: jax.Array) -> tuple[jax.Array, ...]:
        own = _rows(stack, dtype_of(variable, stack))
        if consume:
            jax.block_until_ready(own)
            stack.delete()
        return own

    def taken(stacks: Any, row: int) -> Params:
        return jax.tree.map(lambda rows: rows[row], stacks, is_leaf=lambda x: isinstance(x, tuple))

    blocks, mixers = (
        jax.tree.map(rows, declared[part], model.params[part], is_leaf=is_variable) for part in ("blocks", "mixers")
    )
    types = model.config.layer_types
    layers = [
        {"block": taken(blocks, layer), "mixer": taken(mixers[kind], types[:layer].count(kind))}
        for layer, kind in enumerate(types)
    ]
    if active_mesh() is None:
        del blocks, mixers
        for layer, kind in enumerate(types):  # the parts of a layer are gone before those of the next are joined
            if may_join(model.config, kind):
                layers[layer] = _join(model.config, kind, layers[layer])
                if consume:
                    jax.block_until_ready(layers[layer])
    cast = lambda variable, x: x.astype(dtype_of(variable, x))  # noqa: E731
    ends = {
        name: jax.tree.map(cast, declared[name], model.params[name], is_leaf=is_variable)
        for name in variables(Ends, model.config)
    }
    return Unstacked(ends, tuple(layers), model.config)


@partial(jax.jit, static_argnums=1)
def _rows(stack: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    return tuple(stack[row].astype(dtype) for row in range(stack.shape[0]))


_join = jax.jit(join, static_argnums=(0, 1))


# --- states


def initial_states(config: ModelConfig, rows: int, capacity: int, dtype: Any) -> LayerStates:
    """The empty state of each layer, with room for `capacity` tokens a row in the caches. More are dropped.

    On a mesh the rows are split over `data`, `fsdp` and `context`, and heads over `tensor`.
    """
    mesh = active_mesh()
    devices = 1 if mesh is None else row_devices(mesh)
    if rows % devices:
        raise TopologyError(f"{rows} rows do not divide over the {devices} devices of {BATCH_AXES}; add rows.")
    specs = states_specs(config)

    def local() -> LayerStates:
        states = tuple(
            MIXERS[kind].initial_state(config, rows // devices, capacity, dtype) for kind in config.layer_types
        )
        return jax.tree.map(lambda spec, x: differing(x, *mesh_axes(spec)), specs, states)

    return on_shards(local, (), (), specs)


def grown(cache: jax.Array, capacity: int) -> jax.Array:
    """A cache [B,G,M,K] with room for `capacity` tokens."""
    more = ((0, 0), (0, 0), (0, capacity - cache.shape[2]), (0, 0))
    spec = _state_spec(MIXERS[FULL_ATTENTION].state_heads["k"])
    return on_shards(lambda cache: jnp.pad(cache, more), (cache,), (spec,), spec)


def state_specs(config: ModelConfig, kind: str) -> dict[str, P]:
    mixer = MIXERS[kind]
    names = jax.eval_shape(lambda: mixer.initial_state(config, 1, 1, jnp.float32))
    return {name: _state_spec(mixer.state_heads[name]) for name in names}


def states_specs(config: ModelConfig) -> tuple[dict[str, P], ...]:
    return tuple(state_specs(config, kind) for kind in config.layer_types)


def _state_spec(heads_axis: int | None) -> P:
    return ROWS if heads_axis is None else P(BATCH_AXES, *(None,) * (heads_axis - 1), "tensor")


def layer_specs(config: ModelConfig, kind: str) -> Params | P:
    if active_mesh() is None:
        return P()
    return {
        "block": active_specs(variables(Block, config)),
        "mixer": active_specs(variables(MIXERS[kind], config)),
    }


# --- a prompt, chunk by chunk


class Chunk(NamedTuple):
    """A part of the prompts of some rows; each prompt begins at its row's first token."""

    first: jax.Array  # int32: the place in the prompt of the chunk's first token, the same for all rows
    counts: jax.Array  # [R] int32: how many tokens of the chunk are a row's prompt, from the left
    longest: jax.Array  # int32: tokens of the longest prompt; `dynamic` rotary embedding asks
    # [R] int32: which row of the state each is, counted on its device; one that is not there is nowhere. None: all are.
    rows: jax.Array | None

    @property
    def specs(self) -> "Chunk":
        return Chunk(P(), ROWS, P(), None if self.rows is None else ROWS)  # type: ignore[arg-type]


def embedded(model: Unstacked, tokens_RC: jax.Array) -> jax.Array:
    """What goes into the first layer: [R,C,D]."""

    def local(ends: Params, tokens: jax.Array) -> jax.Array:
        return embed(Model(ends, model.config), tokens)

    return on_shards(local, (model.ends, tokens_RC), (model.specs[0], ROWS), ROWS)


def prefill_layer(
    config: ModelConfig,
    kind: str,
    weights: Params,
    x_RCD: jax.Array,
    state: Params,
    chunk: Chunk,
    view: LayerView | None = None,
) -> tuple[jax.Array, Params]:
    """A chunk through one layer: what goes into the next, and the layer's state after it.

    With the first chunk a row's state begins anew. What is beside a prompt on the right does not change a memory; its
    keys stay in the cache until tokens take their places, and nothing looks at them.
    """

    def local(weights: Params, x: jax.Array, state: Params, chunk: Chunk) -> tuple[jax.Array, Params]:
        own = state if chunk.rows is None else jax.tree.map(lambda s: s.at[chunk.rows].get(mode="fill"), state)
        if kind != FULL_ATTENTION:
            own = jax.tree.map(lambda s: jnp.where(chunk.first == 0, 0, s).astype(s.dtype), own)
        places = jnp.arange(x.shape[1], dtype=jnp.int32)
        segments = (places < chunk.counts[:, None]).astype(jnp.int32)
        tables = rotary_tables(config, jnp.zeros_like(segments) + chunk.first + places, chunk.longest)
        context = TokenContext(segments, **tables, cache_index=chunk.first).at_layer(view)
        x, own = _layer(config, kind, weights, x, context, own)
        if chunk.rows is not None:
            own = jax.tree.map(lambda s, new: s.at[chunk.rows].set(new, mode="drop"), state, own)
        return x, own

    states = state_specs(config, kind)
    specs = layer_specs(config, kind), ROWS, states, chunk.specs
    return on_shards(local, (weights, x_RCD, state, chunk), specs, (ROWS, states))


def _layer(
    config: ModelConfig, kind: str, weights: Params, x: jax.Array, context: TokenContext, state: Params
) -> tuple[jax.Array, Params]:
    if "block" not in weights:
        return joined_layer(config, kind, weights, x, context, state)
    return one_layer(config, kind, x, context, _with_state, weights["block"], weights["mixer"], state)


def _with_state(normed: jax.Array, mixer: Any, context: TokenContext, state: Params) -> tuple[jax.Array, Params]:
    return mixer(normed, context, state)


# --- one token of every row


def decode_token(
    model: Unstacked, tokens_B: jax.Array, states: LayerStates, lengths_B: jax.Array
) -> tuple[jax.Array, LayerStates]:
    """Logits [B,S] float32 of what follows these tokens, and the states with them; lengths_B is each row's before."""

    def local(ends: Params, head: Head, layers: Any, *given: Any) -> tuple[jax.Array, LayerStates]:
        own = Unstacked(ends, layers, model.config)
        return decode_own_token(own, columns_of(own, head), *given)

    (ends, layers), head, states_at = model.specs, model.model.head, states_specs(model.config)
    specs = ends, head_spec(*head.shape), layers, ROWS, states_at, ROWS
    arguments = model.ends, head, model.layers, tokens_B, states, lengths_B
    return on_shards(local, arguments, specs, (ROWS, states_at))


def columns_of(model: Unstacked, head: Head) -> Columns:
    """This device's columns of the head, inside `on_shards`."""
    columns = own_columns(head, model.config.vocab_size, model.dtype)
    return TiedColumns(columns.weight.T, columns.numbers, columns.cap) if model.config.tie_embeddings else columns


def decode_own_token(
    model: Unstacked, columns: Columns, tokens: jax.Array, states: LayerStates, lengths: jax.Array
) -> tuple[jax.Array, LayerStates]:
    """`decode_token` of this device's rows, inside `on_shards`."""
    config, ends = model.config, model.model
    context = TokenContext(None, **rotary_tables(config, lengths[:, None]), cache_index=lengths)
    x, after = embed(ends, tokens[:, None], model.dtype), []
    for kind, view, weights, state in zip(config.layer_types, layer_views(config), model.layers, states):
        own = context.at_layer(view)
        x, new = _layer(config, kind, weights, x, own, state)
        after.append(new)
    logits = columns.logits(gathered(final_norm(ends, x[:, 0])), config.vocab_size)
    return whole(logits, config.vocab_size), tuple(after)
