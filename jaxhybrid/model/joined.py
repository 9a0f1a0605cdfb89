"""Some layers as decoding on one device holds them: weights that are read together lie together.

All projections of a layer's input are one matrix with a row for each result, and so are gate and up of its MLP. The
mixer sees none of this: its projections' results are given to it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import row_product
from jaxhybrid_kernels.numerics import decodes_by_kernels

from jaxhybrid.model.blueprint import Params, bind, is_variable, variables
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.layers import TokenContext, exact_dtype
from jaxhybrid.model.mixers import MIXERS


def may_join(config: ModelConfig, kind: str) -> bool:
    """Whether decoding has kernels that want it, and `joined_layer` says what such a layer does: blocks as Llama's."""
    own = config.norms, config.norm_offset, config.residual_scale, config.activation
    return (
        decodes_by_kernels() and MIXERS[kind].joins and config.experts is None and own == ("before", False, 1.0, "silu")
    )


def input_projections(config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """The projections of a mixer's input and the shape of their results; those that make heads first."""
    declared = variables(MIXERS[kind], config)
    shapes = {
        name: part["kernel"].shape[1:]
        for name, part in declared.items()
        if isinstance(part, dict) and "kernel" in part and part["kernel"].out_sharding[0] == "embed"
    }
    return dict(sorted(shapes.items(), key=lambda item: -len(item[1])))


def join(config: ModelConfig, kind: str, layer: Params) -> Params:
    """A layer's block and mixer with joined weights; everything else stays as it is."""
    block, mixer = layer["block"], dict(layer["mixer"])
    mlp, inputs = dict(block["mlp"]), [mixer.pop(name) for name in input_projections(config, kind)]
    return {
        "inputs": _rows(inputs),
        "output": _rows([mixer.pop("o_proj")], inputs=2),
        "gate_up": _rows([mlp.pop("gate_proj"), mlp.pop("up_proj")]),
        "down": _rows([mlp.pop("down_proj")]),
        "mixer": mixer,
        **{name: block[name] for name in ("input_norm", "post_norm")},
    }


def _rows(parts: list[Params], inputs: int = 1) -> Params:
    """Projections of the same input as one: {weight [O,D], bias [O] if any of them has one}."""

    def matrix(kernel: jax.Array) -> jax.Array:
        return kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T

    weights = [matrix(part["kernel"]) for part in parts]
    own = {"weight": jnp.concatenate(weights)}
    if any("bias" in part for part in parts):
        biases = [part["bias"].reshape(-1) if "bias" in part else jnp.zeros(len(w), w.dtype)
                  for part, w in zip(parts, weights)]  # fmt: skip
        own["bias"] = jnp.concatenate(biases)
    return own


def joined_layer(
    config: ModelConfig, kind: str, layer: Params, x_BTD: jax.Array, context: TokenContext, state: Params
) -> tuple[jax.Array, Params]:
    """`one_layer` of weights from `join`, with a state: x after it, and the state after its last token."""

    def product(name: str, x: jax.Array, norm: str | None = None, **given: Any) -> jax.Array:
        scale = None if norm is None else (layer[norm]["scale"], config.norm_eps)
        return row_product(x, layer[name]["weight"], layer[name].get("bias"), norm=scale, **given)

    with jax.named_scope(kind):
        exact, weights = exact_dtype(x_BTD.dtype), [layer[name]["weight"] for name in ("output", "gate_up")]
        results = product("inputs", x_BTD, "input_norm", dtype=exact, then=list(state.values()))
        out, state = _mixed(config, kind, layer["mixer"], results, x_BTD, context, state, weights)
        x_BTD = product("output", out, residual=x_BTD)
    with jax.named_scope("mlp"):
        hidden = product("gate_up", x_BTD, "post_norm", gated=True)
        return product("down", hidden, residual=x_BTD), state


def absent(part: type[nnx.Module], config: ModelConfig) -> Params:
    """Shapes in the place of a part's parameters, of which some are then given and the others not asked for."""
    return jax.tree.map(lambda variable: variable.get_value(), variables(part, config), is_leaf=is_variable)


def _mixed(
    config: ModelConfig,
    kind: str,
    params: Params,
    results_BTO: jax.Array,
    x_BTD: jax.Array,
    context: TokenContext,
    state: Params,
    then: list[jax.Array],
) -> tuple[jax.Array, Params]:
    """What a mixer makes of its projections' results, before its last one: [B,T,H*K], and its state.

    then: the weights that are read next.
    """
    mixer: Any = bind(MIXERS[kind], config, absent(MIXERS[kind], config) | params)
    firsts, first = {}, 0
    takes_token = context.segment_ids is None and mixer.takes_token(results_BTO[:, 0], context, state)
    for name, shape in input_projections(config, kind).items():
        last = first + math.prod(shape)
        setattr(mixer, name, Given(results_BTO[..., first:last].reshape(*x_BTD.shape[:-1], *shape)))
        firsts[name], first = first, last
    if takes_token:
        return mixer.token(results_BTO[:, 0], firsts, x_BTD, context, state, then)
    mixer.o_proj = Heads()
    return mixer(x_BTD, context, state)


class Given(nnx.Module):
    """A projection whose result is there already."""

    def __init__(self, result: jax.Array):
        self.result = result

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        return self.result.astype(x.dtype if dtype is None else dtype)


class Heads(nnx.Module):
    """In the place of a last projection: its input [...,H,K] as [...,H*K]."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], -1)
