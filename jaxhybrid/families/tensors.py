"""Hugging Face tensor names and layouts against the leaves of our parameter tree: one table, read in both directions.

A Hugging Face `Linear` holds [out, in] with heads folded into one axis; we hold [in..., out...] with heads as an axis
of their own. Layers are separate tensors there and rows of one stacked leaf here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET, ModelConfig, layers_of_kind
from jaxhybrid.model.params import is_spec
from jaxhybrid.model.transformer import declare

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How one tensor lies in the file, given the shape of our leaf for one layer. Both directions are views."""

    file_shape: Callable[[Shape], Shape]
    from_file: Callable[[np.ndarray, Shape], np.ndarray]
    to_file: Callable[[np.ndarray], np.ndarray]


def linear(inputs: int = 1) -> Layout:
    """[out, in] in the file; our first `inputs` axes are its input."""

    def file_shape(shape: Shape) -> Shape:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    def from_file(x: np.ndarray, shape: Shape) -> np.ndarray:
        outputs = len(shape) - inputs  # axes are split before they are swapped, so that a memory map stays a view
        split = x.reshape(*shape[inputs:], *shape[:inputs])
        return split.transpose(*range(outputs, len(shape)), *range(outputs))

    return Layout(file_shape, from_file, lambda x: x.reshape(math.prod(x.shape[:inputs]), -1).T)


SAME = Layout(lambda shape: shape, lambda x, shape: x, lambda x: x)
FOLDED = Layout(lambda shape: (math.prod(shape),), lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
# Taps of a depthwise Conv1d, [channels, 1, W] in the file, [W, heads, head width] here.
TAPS = Layout(
    lambda shape: (math.prod(shape[1:]), 1, shape[0]),
    lambda x, shape: np.moveaxis(x.reshape(*shape[1:], shape[0]), -1, 0),
    lambda x: np.moveaxis(x, 0, -1).reshape(-1, 1, x.shape[0]),
)

Table = Mapping[str, tuple[str, Layout]]  # leaf name -> (name in the file, layout)

MODEL_TENSORS: Table = {
    "embed": ("model.embed_tokens.weight", SAME),
    "final_norm": ("model.norm.weight", SAME),
    "head": ("lm_head.weight", linear()),
}
BLOCK_TENSORS: Table = {
    "input_norm": ("input_layernorm.weight", SAME),
    "post_norm": ("post_attention_layernorm.weight", SAME),
    "gate_proj": ("mlp.gate_proj.weight", linear()),
    "up_proj": ("mlp.up_proj.weight", linear()),
    "down_proj": ("mlp.down_proj.weight", linear()),
    "gate_bias": ("mlp.gate_proj.bias", SAME),
    "up_bias": ("mlp.up_proj.bias", SAME),
    "down_bias": ("mlp.down_proj.bias", SAME),
}
ATTENTION_TENSORS: Table = {
    "q_proj": ("self_attn.q_proj.weight", linear()),
    "k_proj": ("self_attn.k_proj.weight", linear()),
    "v_proj": ("self_attn.v_proj.weight", linear()),
    "o_proj": ("self_attn.o_proj.weight", linear(inputs=2)),
    "q_bias": ("self_attn.q_proj.bias", FOLDED),
    "k_bias": ("self_attn.k_proj.bias", FOLDED),
    "v_bias": ("self_attn.v_proj.bias", FOLDED),
    "o_bias": ("self_attn.o_proj.bias", SAME),
    "q_norm": ("self_attn.q_norm.weight", SAME),
    "k_norm": ("self_attn.k_norm.weight", SAME),
}
GATED_DELTANET_TENSORS: Table = {
    "q_proj": ("linear_attn.q_proj.weight", linear()),
    "k_proj": ("linear_attn.k_proj.weight", linear()),
    "v_proj": ("linear_attn.v_proj.weight", linear()),
    "a_proj": ("linear_attn.a_proj.weight", linear()),
    "b_proj": ("linear_attn.b_proj.weight", linear()),
    "g_proj": ("linear_attn.g_proj.weight", linear()),
    "o_proj": ("linear_attn.o_proj.weight", linear(inputs=2)),
    "q_bias": ("linear_attn.q_proj.bias", FOLDED),
    "k_bias": ("linear_attn.k_proj.bias", FOLDED),
    "v_bias": ("linear_attn.v_proj.bias", FOLDED),
    "o_bias": ("linear_attn.o_proj.bias", SAME),
    "A_log": ("linear_attn.A_log", SAME),
    "dt_bias": ("linear_attn.dt_bias", SAME),
    "o_norm": ("linear_attn.o_norm.weight", SAME),
    "q_norm": ("linear_attn.q_norm.weight", SAME),
    "k_norm": ("linear_attn.k_norm.weight", SAME),
    "q_conv": ("linear_attn.q_conv.weight", TAPS),
    "k_conv": ("linear_attn.k_conv.weight", TAPS),
    "v_conv": ("linear_attn.v_conv.weight", TAPS),
}
LINEAR_MIXERS: Mapping[str, Table] = {GATED_DELTANET: GATED_DELTANET_TENSORS}


@dataclass(frozen=True)
class TensorTable:
    """The names of one family. Linear mixers are the same for all of them."""

    model: Table
    block: Table
    attention: Table

    def mixer(self, kind: str) -> Table:
        return self.attention if kind == FULL_ATTENTION else LINEAR_MIXERS[kind]


LLAMA_TABLE = TensorTable(MODEL_TENSORS, BLOCK_TENSORS, ATTENTION_TENSORS)


class FileTensor(NamedTuple):
    """One tensor of a weights file and where it lives in the tree."""

    name: str  # in the file
    path: tuple[str, ...]  # of the leaf
    row: int | None  # of the stacked leaf; None: the leaf itself
    shape: Shape  # ours, of the one layer
    layout: Layout
    float32: bool  # stored in float32 whatever the rest is

    @property
    def file_shape(self) -> Shape:
        return self.layout.file_shape(self.shape)


def file_tensors(table: TensorTable, config: ModelConfig) -> list[FileTensor]:
    """Every tensor of a model of this config, in the order of a file: embedding, layer by layer, final norm, head."""

    def entries(
        tree: Any, names: Table, prefix: tuple[str, ...], file_prefix: str, row: int | None
    ) -> Iterator[FileTensor]:
        for path, spec in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)[0]:
            (leaf,) = (key.key for key in path)
            name, layout = names[leaf]
            shape = spec.shape if row is None else spec.shape[1:]
            yield FileTensor(file_prefix + name, (*prefix, leaf), row, shape, layout, spec.float32)

    specs = declare(config)
    top = list(entries({k: v for k, v in specs.items() if is_spec(v)}, table.model, (), "", None))
    tensors = [tensor for tensor in top if tensor.path == ("embed",)]
    for layer, kind in enumerate(config.layer_types):
        prefix, row = f"model.layers.{layer}.", layers_of_kind(config.layer_types, kind).index(layer)
        tensors += entries(specs["mixers"][kind], table.mixer(kind), ("mixers", kind), prefix, row)
        tensors += entries(specs["blocks"], table.block, ("blocks",), prefix, layer)
    return tensors + [tensor for tensor in top if tensor.path != ("embed",)]
