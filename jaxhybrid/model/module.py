"""The whole model as one `nnx.Module`, a module for each layer, and back: for tools that work on modules.

net = module(model)        # equal logits; for Qwix (LoRA, quantisation), Tunix, treescope, `nnx.display`
model = model_of(net)      # what a tool changed in the weights, as a `Model` again

docs/modules.md shows each use.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.errors import WeightsError
from jaxhybrid.model.blueprint import Params, bind, shapes_by_name, variables
from jaxhybrid.model.config import layers_of_kind
from jaxhybrid.model.layers import Block, capped, exact_dtype, layer_views
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import Ends, Model, scaled, token_context


class Layer(nnx.Module):
    """One layer: x + mixer(norm x), then + mlp(norm x), or with the block's norms elsewhere."""

    def __init__(self, block: Block, mixer: Any):
        self.block, self.mixer = block, mixer

    def __call__(self, x: jax.Array, context: Any) -> jax.Array:
        mixed = self.mixer(self.block.mixer_input(x), context)[0]
        return self.block.add_mlp(self.block.add_mixed(x, mixed))


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
            NotImplementedError: a cache is given; `jaxhybrid.generate` has one.
        """
        if cache is not None:
            raise NotImplementedError("The unrolled module has no cache; use jaxhybrid.generate with model_of(net).")
        if attention_mask is not None and segment_ids is None:
            segment_ids = jnp.diagonal(attention_mask, axis1=-2, axis2=-1).astype(jnp.int32)
        context = token_context(self.config, tokens_BT, segment_ids, positions)
        x = scaled(self.ends.embed(tokens_BT), self.config.embedding_scale)
        for layer, view in zip(self.layers, layer_views(self.config)):
            x = layer(x, context.at_layer(view))
        x = scaled(self.ends.final_norm(x), self.config.logit_scale)
        if self.ends.head is not None:
            logits = self.ends.head(x, dtype=exact_dtype(x.dtype))
        else:
            table = self.ends.embed.embedding[...]
            logits = jnp.einsum("btd,sd->bts", x, table, preferred_element_type=exact_dtype(x.dtype))
        return capped(logits, self.config.logit_cap), None


def module(model: Model) -> Unrolled:
    """The model as one module. Its arrays are rows of the model's: nothing is shared that a tool could change."""
    return Unrolled(model)


def model_of(net: Unrolled, lora_alpha: float | None = None) -> Model:
    """The model of a module: its weights stacked again. `net` stays as it is.

    Args:
        lora_alpha: merges Qwix's LoRA made with this alpha: each kernel W becomes W + (alpha / rank) A B. Qwix does not
            keep the number in the module.

    Raises:
        WeightsError: the module has something else than the model's parameters (LoRA not merged, quantised weights), or
            there is no LoRA to merge.
    """
    if lora_alpha is not None and not jax.tree.leaves(nnx.state(net, nnx.LoRAParam)):
        raise WeightsError(f"lora_alpha={lora_alpha}, but the module has no LoRA to merge; leave it out.")

    def params(part: type[nnx.Module], bound: nnx.Module) -> Params:
        found = nnx.to_pure_dict(nnx.state(bound))
        return _declared(part, net.config, found if lora_alpha is None else _merged(found, lora_alpha))

    types, layers = net.config.layer_types, list(net.layers)
    mixers = {
        kind: _stack([params(MIXERS[kind], layers[i].mixer) for i in layers_of_kind(types, kind)])
        for kind in dict.fromkeys(types)
    }
    blocks = _stack([params(Block, layer.block) for layer in layers])
    return Model({**params(Ends, net.ends), "blocks": blocks, "mixers": mixers}, net.config, net.folder)


def _merged(params: Params, alpha: float) -> Params:
    """Without the adapters, which Qwix keeps beside the kernel: A [inputs,r] and B [r,outputs]."""
    merged: Params = {name: _merged(x, alpha) if isinstance(x, dict) else x for name, x in params.items()}
    for name, W in params.items():
        if f"{name}_lora_a" in params and isinstance(W, jax.Array):  # a quantised kernel is no array
            A, B = merged.pop(f"{name}_lora_a"), merged.pop(f"{name}_lora_b")
            change = jnp.tensordot(A, B, 1, precision="highest", preferred_element_type=exact_dtype(W.dtype))
            merged[name] = (W + alpha / A.shape[-1] * change).astype(W.dtype)
    return merged


def _declared(part: type[nnx.Module], config: Any, params: Params) -> Params:
    """The same parameters; raises where they are not those that `part` declares."""
    found, wanted = shapes_by_name(params), shapes_by_name(variables(part, config))
    if found != wanted:
        differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise WeightsError(
            f"The module is no plain model any more: {part.__name__} differs in {', '.join(differing[:5])}. "
            "Merge LoRA (lora_alpha of model_of), or turn quantised weights back, first."
        )
    return params


def _row(stack: Params, row: int) -> Params:
    return jax.tree.map(lambda w: w[row], stack)


def _stack(rows: list[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
