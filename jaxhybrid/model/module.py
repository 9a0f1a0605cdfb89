"""The whole model as one `nnx.Module`, a module for each layer, and back: for tools that work on modules.

net = module(model)        # equal logits; for Qwix (LoRA, quantisation), Tunix, treescope, `nnx.display`
model = model_of(net)      # what a tool changed in the weights, as a `Model` again
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.errors import WeightsError
from jaxhybrid.model.blueprint import Params, bind, variables
from jaxhybrid.model.config import layers_of_kind
from jaxhybrid.model.layers import Block, exact_dtype
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import Ends, Model, token_context


class Layer(nnx.Module):
    """One pre-norm layer: x + mixer(norm x), then + mlp(norm x)."""

    def __init__(self, block: Block, mixer: Any):
        self.block, self.mixer = block, mixer

    def __call__(self, x: jax.Array, context: Any) -> jax.Array:
        x = x + self.mixer(self.block.input_norm(x), context)[0]
        return self.block.add_mlp(x)


class Unrolled(nnx.Module):
    """All layers one after the other, without a scan: a tool may change each of them by itself."""

    def __init__(self, model: Model):
        config, params = model.config, model.params
        self.config, self.folder = config, model.folder
        self.ends = bind(Ends, config, {name: params[name] for name in variables(Ends, config)})
        self.layers = nnx.List(
            Layer(
                bind(Block, config, _row(params["blocks"], layer)),
                bind(MIXERS[kind], config, _row(params["mixers"][kind], config.layer_types[:layer].count(kind))),
            )
            for layer, kind in enumerate(config.layer_types)
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        cache: Any = None,
        attention_mask: Any = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """(logits [B,T,S], None), called as the trainers of this field call a model.

        Args:
            attention_mask: [B,T,T] bool, causal but for padding: which tokens are real is read off its diagonal.
            segment_ids: [B,T], documents of a row counted from 1, 0 is padding. With neither a row is one document.

        Raises:
            NotImplementedError: a cache is given; `jaxhybrid.model.decode` goes on from a state.
        """
        if cache is not None:
            raise NotImplementedError("The unrolled module has no cache; decode with jaxhybrid.model.decode.")
        if attention_mask is not None and segment_ids is None:
            segment_ids = jnp.diagonal(attention_mask, axis1=-2, axis2=-1).astype(jnp.int32)
        context = token_context(self.config, tokens_BT, segment_ids, positions)
        x = self.ends.embed(tokens_BT)
        for layer in self.layers:
            x = layer(x, context)
        x = self.ends.final_norm(x)
        if self.ends.head is not None:
            return self.ends.head(x, dtype=exact_dtype(x.dtype)), None
        table = self.ends.embed.embedding[...]
        return jnp.einsum("btd,sd->bts", x, table, preferred_element_type=exact_dtype(x.dtype)), None


def module(model: Model) -> Unrolled:
    """The model as one module. Its arrays are rows of the model's: nothing is shared that a tool could change."""
    return Unrolled(model)


def model_of(net: Unrolled) -> Model:
    """The model of a module: its weights stacked again.

    Raises:
        WeightsError: the module has something else than the model's parameters (LoRA not merged, quantised weights).
    """
    config, layers = net.config, list(net.layers)
    blocks = [_params(Block, config, layer.block) for layer in layers]
    mixers = {
        kind: _stack([_params(MIXERS[kind], config, layers[i].mixer) for i in layers_of_kind(config.layer_types, kind)])
        for kind in dict.fromkeys(config.layer_types)
    }
    ends = _params(Ends, config, net.ends)
    return Model({**ends, "blocks": _stack(blocks), "mixers": mixers}, config, net.folder)


def _params(part: type[nnx.Module], config: Any, bound: nnx.Module) -> Params:
    params = nnx.to_pure_dict(nnx.state(bound))
    declared = variables(part, config)
    found, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in (
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree_util.tree_leaves_with_path(declared, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)),
        )
    )
    if found != wanted:
        differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise WeightsError(
            f"The module is no plain model any more: {part.__name__} differs in {', '.join(differing[:5])}. "
            "Merge LoRA into the weights, or turn quantised weights back, first."
        )
    return params


def _row(stack: Params, row: int) -> Params:
    return jax.tree.map(lambda w: w[row], stack)


def _stack(rows: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
