"""The model, top to bottom: embedding, blocks of mixer and MLP, final norm, head. Pure functions of a `Model`.

Parameters of all blocks are stacked on a leading layer axis; each kind of mixer has its own stack, one row a layer:

    embed, final_norm, head         unless the embedding is the head
    blocks                          norms and MLP of every layer
    mixers: {kind: ...}             row j is the j-th layer of that kind

`walk` is the one loop over the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxhybrid.model.blueprint import Params, cast, initialize, is_variable, variables
from jaxhybrid.model.config import ModelConfig, layers_of_kind
from jaxhybrid.model.layers import (
    Block,
    Embedding,
    Linear,
    RMSNorm,
    TokenContext,
    exact_dtype,
    rms_norm,
    segment_positions,
)
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import gather, param_shardings, per_example
from jaxhybrid.model.rope import rotary_tables
from jaxhybrid.model.walk import walk


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """Parameters with their description. A pytree: only `params` are leaves."""

    params: Params
    config: ModelConfig = field(metadata={"static": True})
    # The Hugging Face folder it came from (tokenizer, raw config).
    folder: str = field(default="", metadata={"static": True})

    @property
    def head(self) -> jax.Array:
        """The matrix [D,S] that turns final hidden states into logits."""
        if self.config.tie_embeddings:
            return self.params["embed"]["embedding"].T
        return self.params["head"]["kernel"]

    def cast(self, dtype: Any) -> "Model":
        """In the compute dtype; what is declared `Exact` stays."""
        declared = model_variables(self.config)
        # A traced choice of softmax layers has mixers that the config does not name.
        for kind in self.params["mixers"].keys() - declared["mixers"].keys():
            declared["mixers"][kind] = variables(MIXERS[kind], self.config)
        return Model(cast(declared, self.params, dtype), self.config, self.folder)


class Ends(nnx.Module):
    """What stands before the first block and after the last one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        S, D = config.vocab_size, config.hidden_size
        self.embed = Embedding(rngs, (S, D))
        self.final_norm = RMSNorm(rngs, D, "embed", config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(rngs, (D, S), ("embed", "vocab"))


def model_variables(config: ModelConfig) -> Params:
    """Every parameter of the model as a Variable that holds its shape."""
    return _tree(config, lambda part, rows: variables(part, config, rows))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Shapes and shardings on a mesh without values, to compile ahead of time."""
    declared = model_variables(config)
    return jax.tree.map(
        lambda variable, sharding: jax.ShapeDtypeStruct(variable.shape, jnp.float32, sharding=sharding),
        declared,
        param_shardings(declared, mesh),
        is_leaf=is_variable,
    )


def random_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters; pure, so it can be jitted with sharded outputs."""
    keys = iter(jax.random.split(key, 2 + len(set(config.layer_types))))
    return _tree(config, lambda part, rows: initialize(part, config, next(keys), rows))


def _tree(config: ModelConfig, make: Callable[[type[nnx.Module], int | None], Params]) -> Params:
    """The tree of a model, with what `make(part, rows of its stack)` gives in every place."""
    rows = {kind: len(layers_of_kind(config.layer_types, kind)) for kind in MIXERS if kind in config.layer_types}
    ends, blocks = make(Ends, None), make(Block, config.num_layers)
    return {**ends, "blocks": blocks, "mixers": {kind: make(MIXERS[kind], count) for kind, count in rows.items()}}


def forward(
    model: Model,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Logits [B,T,S] in float32 (float64 for dtype float64).

    Holds them whole: for losses over a large vocabulary use `losses` on `hidden_states`.
    """
    hidden = hidden_states(model, tokens_BT, segment_ids_BT, positions_BT, dtype=dtype, remat=remat)
    with jax.named_scope("head"):
        head = gather(model.head.astype(dtype))
        return jnp.einsum("btd,ds->bts", hidden, head, preferred_element_type=exact_dtype(hidden.dtype))


def hidden_states(
    model: Model,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    *,
    softmax: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Hidden states after the final norm, [B,T,D] in `dtype`.

    Args:
        segment_ids_BT: which document each token belongs to; 0 is padding. None: each row is one document.
        positions_BT: rotary positions; by default each segment counts from 0.
        softmax: [L] bool, traced: layers that are softmax in this student of linear layers, so that one compiled
            program serves every choice. `mixers.full_attention` has a row for each layer, or one for all of them.
        remat: keep only the blocks' inputs for the backward pass and recompute the rest.
    """
    model = model.cast(dtype)
    context = token_context(model.config, tokens_BT, segment_ids_BT, positions_BT)

    x, _ = walk(model.params, model.config, embed(model, tokens_BT), context, _mix, softmax=softmax, remat=remat)
    return final_norm(model, x)


def _mix(normed: jax.Array, mixer: Any, context: TokenContext, _: None) -> tuple[jax.Array, None]:
    return mixer(normed, context)[0], None


def outputs(
    model: Model,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    softmax: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(hidden states [B,T,D], head [D,S] whole on every device): what a loss over the vocabulary needs of a model."""
    hidden = hidden_states(model, tokens_BT, segment_ids_BT, softmax=softmax, dtype=dtype, remat=remat)
    return hidden, gather(model.head.astype(dtype))


# --- what else starts from an embedding and walks the layers: alignment, decoding


def embed(model: Model, tokens_BT: jax.Array) -> jax.Array:
    """Token embeddings [B,T,D]."""
    with jax.named_scope("embed"):
        table = gather(model.params["embed"]["embedding"])
        return per_example(lambda tokens, table: table[tokens], tokens_BT, whole=(table,))


def final_norm(model: Model, x: jax.Array) -> jax.Array:
    return rms_norm(x, gather(model.params["final_norm"]["scale"]), model.config.norm_eps)


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
