"""The model, top to bottom: embedding, blocks of mixer and MLP, final norm, head. Pure functions of a pytree.

Parameters of all blocks are stacked on a leading layer axis; each kind of mixer has its own stack. A run of
neighbouring layers of one kind is one `lax.scan`, so compile time follows the number of runs, not the depth, and any
pattern works.
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, layers_of_kind
from jaxhybrid.model.layers import (
    TokenContext,
    declare_mlp,
    declare_norms,
    exact_dtype,
    mlp,
    rms_norm,
    segment_positions,
)
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.params import Params, ParamSpec, cast_params, is_spec, normal, ones
from jaxhybrid.model.partition import gather, per_example
from jaxhybrid.model.rope import rotary_tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """Parameters with their description. A pytree: only `params` are leaves."""

    params: Params
    config: ModelConfig = field(metadata={"static": True})
    folder: str = field(
        default="", metadata={"static": True}
    )  # the Hugging Face folder it came from (tokenizer, raw config)


class LayerRun(NamedTuple):
    """Neighbouring layers of one kind: layers [start, stop), rows [first, first + stop - start) of the kind's stack."""

    kind: str
    start: int
    stop: int
    first: int


def layer_runs(layer_types: tuple[str, ...]) -> list[LayerRun]:
    runs, start, used = [], 0, dict.fromkeys(layer_types, 0)
    for kind, group in groupby(layer_types):
        length = len(list(group))
        runs.append(LayerRun(kind, start, start + length, used[kind]))
        start += length
        used[kind] += length
    return runs


def declare(config: ModelConfig) -> Params:
    """Every parameter of the model, as a tree of ParamSpec."""
    S, D, L = config.vocab_size, config.hidden_size, config.num_layers
    specs: Params = {
        "embed": ParamSpec((S, D), ("vocab", "embed"), normal()),
        "final_norm": ParamSpec((D,), ("embed",), ones),
        "blocks": stack(declare_norms(config) | declare_mlp(config), L),
        "mixers": {
            kind: stack(MIXERS[kind].declare(config), len(layers_of_kind(config.layer_types, kind)))
            for kind in MIXERS
            if kind in config.layer_types
        },
    }
    if not config.tie_embeddings:
        specs["head"] = ParamSpec((D, S), ("embed", "vocab"), normal())
    return specs


def stack(specs: Params, count: int) -> Params:
    return jax.tree.map(lambda spec: spec.stacked(count), specs, is_leaf=is_spec)


def head_matrix(params: Params, config: ModelConfig) -> jax.Array:
    """The matrix [D,S] that turns final hidden states into logits."""
    return params["embed"].T if config.tie_embeddings else params["head"]


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Logits [B,T,S], float32 (float64 for dtype float64).

    Holds them whole: for losses over a large vocabulary use `losses` on `hidden_states`.
    """
    hidden = hidden_states(params, config, tokens_BT, segment_ids_BT, positions_BT, dtype=dtype, remat=remat)
    head = gather(head_matrix(params, config).astype(dtype))
    return jnp.einsum("btd,ds->bts", hidden, head, preferred_element_type=exact_dtype(hidden.dtype))


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Hidden states after the final norm, [B,T,D] in `dtype`.

    Args:
        segment_ids_BT: which document each token belongs to; 0 is padding. None: each row is one document.
        positions_BT: rotary positions; by default each segment counts from 0.
        remat: keep only the blocks' inputs for the backward pass and recompute the rest.
    """
    params = cast_params(params, declare(config), dtype)
    context = token_context(config, tokens_BT, segment_ids_BT, positions_BT)
    x = embed(params, tokens_BT)

    for run in layer_runs(config.layer_types):

        def body(x: jax.Array, weights: tuple[Params, Params], kind: str = run.kind) -> tuple[jax.Array, None]:
            return block(gather(weights), config, kind, x, context), None

        weights = (
            take_layers(params["blocks"], run.start, run.stop),
            take_layers(params["mixers"][run.kind], run.first, run.first + run.stop - run.start),
        )
        x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, weights)
    return final_norm(params, config, x)


def block(
    weights: tuple[Params, Params], config: ModelConfig, kind: str, x: jax.Array, context: TokenContext
) -> jax.Array:
    """One pre-norm block, of weights (block, mixer): x + mixer(norm x), then + mlp(norm x)."""
    block_params, mixer_params = weights
    normed = rms_norm(x, block_params["input_norm"], config.norm_eps)
    mixed, _ = MIXERS[kind].apply(mixer_params, config, normed, context)
    return add_mlp(block_params, config, x + mixed)


def add_mlp(block_params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    """x + mlp(norm x): the half of a block that teacher and student share."""
    return x + mlp(block_params, config, rms_norm(x, block_params["post_norm"], config.norm_eps))


def candidate_hidden_states(
    params: Params,
    config: ModelConfig,
    linear_kind: str,
    softmax_layer: jax.Array,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Hidden states of the student in which only `softmax_layer` (a traced scalar) is softmax, [B,T,D].

    Because the layer is a value and not a shape, one compiled program serves every candidate.

    Args:
        params: as `declare` of the all-linear student, plus `mixers.full_attention` with exactly one row: the softmax
            layer of this candidate.
        config: with every layer of `linear_kind`.
    """
    specs = declare(config)
    specs["mixers"][FULL_ATTENTION] = stack(MIXERS[FULL_ATTENTION].declare(config), 1)
    params = cast_params(params, specs, dtype)
    context = token_context(config, tokens_BT, segment_ids_BT, None)
    attention = gather(take_layer(params["mixers"][FULL_ATTENTION], 0))

    def body(x: jax.Array, scanned: tuple[jax.Array, Params, Params]) -> tuple[jax.Array, None]:
        layer, block_params, mixer_params = scanned
        block_params, mixer_params = gather((block_params, mixer_params))
        normed = rms_norm(x, block_params["input_norm"], config.norm_eps)
        mixed = jax.lax.cond(
            layer == softmax_layer,
            lambda normed: MIXERS[FULL_ATTENTION].apply(attention, config, normed, context)[0],
            lambda normed: MIXERS[linear_kind].apply(mixer_params, config, normed, context)[0],
            normed,
        )
        return add_mlp(block_params, config, x + mixed), None

    layers = (jnp.arange(config.num_layers), params["blocks"], params["mixers"][linear_kind])
    x, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, embed(params, tokens_BT), layers)
    return final_norm(params, config, x)


# --- pieces that stages with their own walk over the layers (alignment, decoding) put together themselves


def embed(params: Params, tokens_BT: jax.Array) -> jax.Array:
    """Token embeddings [B,T,D]."""
    return per_example(lambda tokens, table: table[tokens], tokens_BT, whole=(gather(params["embed"]),))


def final_norm(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    return rms_norm(x, gather(params["final_norm"]), config.norm_eps)


def token_context(
    config: ModelConfig, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None, positions_BT: jax.Array | None
) -> TokenContext:
    """Segments and rotary tables of a batch."""
    if positions_BT is None:
        if segment_ids_BT is None:
            positions_BT = per_example(
                lambda tokens: jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape), tokens_BT
            )
        else:
            positions_BT = per_example(segment_positions, segment_ids_BT)
    return TokenContext(segment_ids_BT, *rotary_tables(config, positions_BT))


def take_layers(stacked: Params, start: int, stop: int) -> Params:
    """Rows [start, stop) of every stacked parameter.

    By `split`, whose transpose is one concatenation, where that of slicing adds a zero-padded array per run.
    """

    def take(x: jax.Array) -> jax.Array:
        if (start, stop) == (0, x.shape[0]):
            return x
        sizes = (start, stop - start, x.shape[0] - stop)
        return jax.lax.split(x, sizes)[1]

    return jax.tree.map(take, stacked)


def take_layer(stacked: Params, index: int) -> Params:
    return jax.tree.map(lambda x: jnp.squeeze(x, 0), take_layers(stacked, index, index + 1))
