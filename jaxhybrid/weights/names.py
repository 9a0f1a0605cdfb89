"""Hugging Face tensor names and layouts against the leaves of our parameter tree: one rule, read in both directions.

A leaf's path is its name in the file, but for the few that a family renames (`Family.names`). A Hugging Face `Linear`
holds [out, in] with heads folded into one axis; we hold [in..., out...] with heads as an axis of their own. Layers, and
the experts of a layer, are separate tensors there and rows of one stacked leaf here.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxhybrid.families import family
from jaxhybrid.model.blueprint import Exact, is_variable, variables
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, layers_of_kind
from jaxhybrid.model.layers import Block
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import Ends

Shape = tuple[int, ...]
LAYER = re.compile(r"model\.layers\.\d+\.")


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


class FileTensor(NamedTuple):
    """One tensor of a weights file and where it lives in the tree."""

    name: str  # in the file
    path: tuple[str, ...]  # of the leaf
    rows: tuple[int, ...]  # its place on the leaf's first axes: none, that of layers, or those of layers and experts
    shape: Shape  # ours, without those axes
    layout: Layout
    float32: bool  # stored in float32 whatever the rest is

    @property
    def file_shape(self) -> Shape:
        return self.layout.file_shape(self.shape)

    @property
    def parts(self) -> tuple["FileTensor", ...]:
        """What is read to write it: itself alone. See `weights.native` for tensors made of several."""
        return (self,)

    def to_file(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """It, of the values of its parts in the file's layout."""
        return values[0]


class FusedTensor(NamedTuple):
    """Several tensors of a file in one, the rows of each below those of the one before."""

    name: str
    parts: tuple[FileTensor, ...]

    @property
    def file_shape(self) -> Shape:
        shapes = [part.file_shape for part in self.parts]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    @property
    def float32(self) -> bool:
        return self.parts[0].float32

    def to_file(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(values)


def file_tensors(config: ModelConfig) -> list[FileTensor]:
    """Every tensor of a model of this config, in the order of a file: embedding, layer by layer, final norm, head."""
    names = family(config.family).names

    def entries(
        part: type[nnx.Module], place: tuple[str, ...], prefix: str, rows: tuple[int, ...] = ()
    ) -> Iterator[FileTensor]:
        declared = jax.tree_util.tree_flatten_with_path(variables(part, config), is_leaf=is_variable)[0]
        for keys, variable in declared:
            path = tuple(key.key for key in keys)
            *modules, leaf = path
            modules[:1] = [names.get(module, module) for module in modules[:1]]
            file_leaf, layout = _leaf(leaf, variable)
            own = partial(FileTensor, path=(*place, *path), layout=layout, float32=isinstance(variable, Exact))
            if "experts" not in variable.out_sharding:
                yield own(prefix + ".".join([*modules, file_leaf]), rows=rows, shape=variable.shape)
                continue
            for expert in range(variable.shape[0]):
                name = prefix + ".".join([*modules[:-1], str(expert), modules[-1], file_leaf])
                yield own(name, rows=(*rows, expert), shape=variable.shape[1:])

    ends = list(entries(Ends, (), ""))
    tensors = [tensor for tensor in ends if tensor.path[0] == "embed"]
    for layer, kind in enumerate(config.layer_types):
        prefix, row = f"model.layers.{layer}.", layers_of_kind(config.layer_types, kind).index(layer)
        room = "self_attn" if kind == FULL_ATTENTION else "linear_attn"
        tensors += entries(MIXERS[kind], ("mixers", kind), f"{prefix}{room}.", (row,))
        tensors += entries(Block, ("blocks",), prefix, (layer,))
    return tensors + [tensor for tensor in ends if tensor.path[0] != "embed"]


def fused_tensors(config: ModelConfig) -> dict[str, list[str]]:
    """Of tensors that the family's own files keep fused: the names of `file_tensors` whose rows they are, in order."""

    def named(layer: int, own: str, expert: int) -> str:
        return f"model.layers.{layer}.{own.format(expert=expert)}.weight"

    return {
        named(layer, whole, expert): [named(layer, part, expert) for part in parts]
        for layer in range(config.num_layers)
        for whole, parts in family(config.family).fused.items()
        for expert in range(config.experts.count if config.experts and "{expert}" in whole else 1)
    }


def stacked_tensors(config: ModelConfig) -> dict[str, list[str]]:
    """The same of experts in one tensor [E,..,..], as transformers 5 has them in memory and may save them."""
    wholes = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    if config.experts is None:
        return {}
    return {
        f"model.layers.{layer}.mlp.experts.{whole}": [
            f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
            for expert in range(config.experts.count)
            for part in parts
        ]
        for layer in range(config.num_layers)
        for whole, parts in wholes.items()
    }


def teacher_tensors(config: ModelConfig) -> list[FileTensor | FusedTensor]:
    """`file_tensors`, fused as the family's own files have them; exports have them apart."""
    parts = {entry.name: entry for entry in file_tensors(config)}
    fused = fused_tensors(config)
    first = {names[0]: FusedTensor(name, tuple(parts[part] for part in names)) for name, names in fused.items()}
    others = {part for names in fused.values() for part in names[1:]}
    return [first.get(name, entry) for name, entry in parts.items() if name not in others]


def layer_and_own(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.3.`, `mlp.up_proj.weight`); outside layers ("", name)."""
    found = LAYER.match(name)
    return ("", name) if found is None else (found[0], name[found.end() :])


def _leaf(name: str, variable: nnx.Variable) -> tuple[str, Layout]:
    """What the file calls a module's own parameter of this name, and how it lies there."""
    if name == "kernel":
        return "weight", linear(variable.get_metadata("inputs"))
    return {
        "bias": ("bias", FOLDED),
        "scale": ("weight", FOLDED),
        "embedding": ("weight", SAME),
        "taps": ("weight", TAPS),
    }.get(name, (name, SAME))
