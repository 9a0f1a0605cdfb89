"""The model, top to bottom: embedding, blocks of mixer and MLP, final norm, head. Pure functions of a `Model`.

Parameters of all blocks are stacked on a leading layer axis; each kind of mixer has its own stack, one row a layer:

    embed, final_norm, head         unless the embedding is the head
    blocks                          norms and MLP of every layer
    mixers: {kind: ...}             row j is the j-th layer of that kind

`walk` is the one loop over the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.blueprint import Exact, Params, cast, check_names, initialize, is_variable, variables
from jaxhybrid.model.config import ModelConfig, Remat, layers_of_kind
from jaxhybrid.model.head import Head, gathered, own_columns, whole
from jaxhybrid.model.layers import (
    Block,
    Embedding,
    Linear,
    RMSNorm,
    TokenContext,
    look_up,
    rms_norm,
    segment_positions,
)
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import (
    AnyMesh,
    active_specs,
    axis_index,
    axis_size,
    batch_spec,
    gather,
    head_spec,
    joined,
    on_shards,
    param_shardings,
    splits_tokens,
)
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
    def head(self) -> Head:
        """What turns final hidden states into logits."""
        tied = self.config.tie_embeddings
        kernel = self.params["embed"]["embedding"].T if tied else self.params["head"]["kernel"]
        return Head(kernel, self.config.logit_cap)

    @property
    def specs(self) -> Params | P:
        """How the parameters are split over the active mesh; errors as `declared` and `param_specs`."""
        return active_specs(self.declared)

    @property
    def declared(self) -> Params:
        """Every parameter as a Variable. Raises WeightsError where the parameters are others than the config has."""
        declared = model_variables(self.config)
        # A traced choice of softmax layers has mixers that the config does not name.
        for kind in self.params["mixers"].keys() - declared["mixers"].keys():
            rows = len(jax.tree.leaves(self.params["mixers"][kind])[0])
            declared["mixers"][kind] = variables(MIXERS[kind], self.config, rows)
        check_names(declared, self.params)
        return declared

    def cast(self, dtype: Any) -> "Model":
        """In the compute dtype; what is declared `Exact` stays."""
        return Model(cast(self.declared, self.params, dtype), self.config, self.folder)

    def in_float8(self) -> "Model":
        """Its MLPs multiply in float8: of a frozen model. Raises ConfigError where they are mixtures of experts."""
        return replace(self, config=replace(self.config, float8_mlp=True))


class Ends(nnx.Module):
    """What stands before the first block and after the last one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        S, D = config.vocab_size, config.hidden_size
        self.embed = Embedding(rngs, (S, D))
        self.final_norm = RMSNorm(rngs, D, "embed", config.norm_eps, config.norm_offset)
        self.head = None if config.tie_embeddings else Linear(rngs, (D, S), ("embed", "vocab"))


def model_variables(config: ModelConfig) -> Params:
    """Every parameter of the model as a Variable that holds its shape."""
    return _tree(config, lambda part, rows: variables(part, config, rows))


def abstract_params(config: ModelConfig, mesh: AnyMesh, dtype: Any = jnp.float32) -> Params:
    """Shapes, types and shardings on a mesh without values; what is declared `Exact` is float32."""

    def leaf(variable: nnx.Variable, sharding: Any) -> jax.ShapeDtypeStruct:
        kept = jnp.float32 if isinstance(variable, Exact) else dtype
        return jax.ShapeDtypeStruct(variable.shape, kept, sharding=sharding)

    declared = model_variables(config)
    return jax.tree.map(leaf, declared, param_shardings(declared, mesh), is_leaf=is_variable)


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
    remat: Remat = "none",
) -> jax.Array:
    """Logits [B,T,S] in float32 (float64 for dtype float64).

    Holds them whole: for losses over a large vocabulary use `losses` on `hidden_states`.
    """
    hidden = hidden_states(model, tokens_BT, segment_ids_BT, positions_BT, dtype=dtype, remat=remat)

    def local(hidden: jax.Array, head: Head) -> jax.Array:
        columns = own_columns(head, model.config.vocab_size, dtype)
        logits = columns.logits(gathered(hidden.reshape(-1, hidden.shape[-1])), model.config.vocab_size)
        return whole(logits, model.config.vocab_size).reshape(*hidden.shape[:2], -1)

    spec = batch_spec(tokens_BT)
    return on_shards(local, (hidden, model.head), (spec, head_spec(*model.head.shape)), spec)


def hidden_states(
    model: Model,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    *,
    softmax: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    unroll: bool = False,
    sums: Any = jnp.float32,
) -> jax.Array:
    """Hidden states after the final norm, [B,T,D] in `dtype`.

    Args:
        segment_ids_BT: which document each token belongs to; 0 is padding. None: each row is one document.
        positions_BT: rotary positions; by default each segment counts from 0.
        softmax: [L] bool, traced: layers that are softmax in this student of linear layers, so that one compiled
            program serves every choice. `mixers.full_attention` has a row for each layer, or one for all of them.
        remat: what of a block is kept for the backward pass, see `walk`.
        unroll: a program with each layer by itself, see `walk`.
        sums: dtype in which devices add up the gradients of their shared weights.
    """

    def local(params: Params, tokens: jax.Array, segments: Any, positions: Any, softmax: Any) -> jax.Array:
        own = Model(params, model.config)
        context = token_context(model.config, tokens, segments, positions, split=splits_tokens(spec))
        x = embed(own, tokens, dtype)
        x, _ = walk(params, model.config, x, context, mix_alone, softmax=softmax, **given)
        return final_norm(own, x, sums)

    spec, given = batch_spec(tokens_BT), {"remat": remat, "unroll": unroll, "sums": sums}
    arguments = model.params, tokens_BT, segment_ids_BT, positions_BT, softmax
    return on_shards(local, arguments, (model.specs, spec, spec, spec, P()), spec)


def mix_alone(normed: jax.Array, mixer: Any, context: TokenContext, _: None) -> tuple[jax.Array, None]:
    """For `walk`: the mixer's output and nothing beside it."""
    return mixer(normed, context)[0], None


def outputs(
    model: Model,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    softmax: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    unroll: bool = False,
    sums: Any = jnp.float32,
) -> tuple[jax.Array, Head]:
    """(hidden states [B,T,D], head as it is stored): what a loss over the vocabulary needs of a model."""
    given = {"softmax": softmax, "dtype": dtype, "remat": remat, "unroll": unroll, "sums": sums}
    hidden = hidden_states(model, tokens_BT, segment_ids_BT, **given)
    return hidden, model.head


# --- what else starts from an embedding and walks the layers: alignment, decoding


def embed(model: Model, tokens_BT: jax.Array, dtype: Any = None) -> jax.Array:
    """Token embeddings [B,T,D]."""
    table = model.params["embed"]["embedding"]
    with jax.named_scope("embed"):
        x = look_up(table, tokens_BT, model.config.vocab_size, table.dtype if dtype is None else dtype)
        return scaled(x, model.config.embedding_scale)


def scaled(x: jax.Array, scale: float) -> jax.Array:
    """x times a number rounded to its type, as transformers does it."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def final_norm(model: Model, x: jax.Array, sums: Any = jnp.float32) -> jax.Array:
    """What the head takes: its product with the head are logits, their scale included."""
    declared = model_variables(model.config)["final_norm"]
    scale = gather(declared, model.params["final_norm"], x.dtype, sums)["scale"]
    config = model.config
    return scaled(rms_norm(x, scale, config.norm_eps, config.norm_offset), config.logit_scale)


def token_context(
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    positions_BT: jax.Array | None,
    split: bool = True,
) -> TokenContext:
    """Segments and rotary tables of a batch, whose tokens may be `split` over devices."""
    T, is_split = tokens_BT.shape[1], split and axis_size("context") > 1
    first = axis_index("context") * T if is_split else jnp.int32(0)
    every = segment_ids_BT if segment_ids_BT is None or not is_split else joined(segment_ids_BT, 1, "context")
    if positions_BT is None:
        if every is None:
            positions_BT = jnp.zeros_like(tokens_BT) + first + jnp.arange(T, dtype=jnp.int32)
        else:
            positions_BT = jax.lax.dynamic_slice_in_dim(segment_positions(every), first, T, 1)
    tables = rotary_tables(config, positions_BT)
    if not is_split:
        return TokenContext(segment_ids_BT, **tables)
    return TokenContext(segment_ids_BT, **tables, key_segment_ids=every, first_token=first)
