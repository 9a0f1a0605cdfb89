"""A student's weights as `qwen3_5_text` has them: the same function, by other tensors.

- A norm's scale s is stored as s - 1; that of a linear layer's output as it is.
- Softmax attention is multiplied by sigmoid(gate) before o_proj: gate rows of zero give 1/2, and o_proj is doubled.
- A linear layer's q, k and v lie in one tensor, and so do their convolutions; taps [0, .., 0, 1] are no convolution.

Every step is exact but one: s - 1 rounds for some s below 1/2. There powers of two help: see `fold.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.families.native import NO_CONVOLUTION_TAPS
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.names import FileTensor, Shape, file_tensors
from jaxhybrid.weights.safetensors import StoredTensor

# Suffixes of our names after the layer's, and what becomes of the tensor.
RENAMED = {
    "linear_attn.g_proj.weight": "linear_attn.in_proj_z.weight",
    "linear_attn.a_proj.weight": "linear_attn.in_proj_a.weight",
    "linear_attn.b_proj.weight": "linear_attn.in_proj_b.weight",
    "linear_attn.o_norm.weight": "linear_attn.norm.weight",
    "linear_attn.o_proj.weight": "linear_attn.out_proj.weight",
}
QKV, TAPS = "linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"
JOINED = {
    QKV: [f"linear_attn.{name}_proj.weight" for name in "qkv"],
    TAPS: [f"linear_attn.{name}_conv.weight" for name in "qkv"],
}
CENTRED = (
    *("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
)
GATED, DOUBLED = "self_attn.q_proj.weight", "self_attn.o_proj.weight"
LAYER = re.compile(r"model\.layers\.\d+\.")
WAY_OUT = "it was changed after jaxhybrid exported it, and is for transformers alone."


class Change(NamedTuple):
    """How a tensor of the architecture is made of ours, and the way back; all in the file's layout."""

    shape: Callable[[Sequence[Shape]], Shape]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray, Sequence[Shape], int], np.ndarray]  # part i of ours


@dataclass(frozen=True)
class NativeTensor:
    """A tensor of the architecture, of `parts` of ours."""

    name: str
    parts: tuple[FileTensor, ...]
    change: Change

    @property
    def file_shape(self) -> Shape:
        return self.change.shape([part.file_shape for part in self.parts])

    @property
    def float32(self) -> bool:
        return any(part.float32 for part in self.parts)

    def to_file(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return self.change.join(values)


@dataclass(frozen=True)
class PartOfTensor:
    """Our tensor inside one of the architecture's; stands in for a `StoredTensor`."""

    whole: StoredTensor
    native: NativeTensor
    index: int

    @property
    def file(self) -> object:
        return self.whole.file

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def shape(self) -> Shape:
        return self.native.parts[self.index].file_shape

    def view(self) -> np.ndarray:
        shapes = [part.file_shape for part in self.native.parts]
        try:
            return self.native.change.split(self.whole.view(), shapes, self.index)
        except WeightsError as error:
            raise WeightsError(f"{self.native.name} in {self.whole.file} {error}") from error


def native_tensors(config: ModelConfig) -> list[NativeTensor]:
    """Every tensor of the architecture for a model of this config, in the order of a file."""
    by_name = {tensor.name: tensor for tensor in file_tensors(config)}
    tensors = []
    for tensor in by_name.values():
        layer, own = layer_and_own(tensor.name)
        whole = next((whole for whole, parts in JOINED.items() if own in parts), None)
        if whole is None:
            tensors.append(NativeTensor(layer + RENAMED.get(own, own), (tensor,), _change(own, config.head_dim)))
        elif own == JOINED[whole][0]:
            tensors.append(NativeTensor(layer + whole, tuple(by_name[layer + part] for part in JOINED[whole]), STACKED))
            if whole == QKV and layer + JOINED[TAPS][0] not in by_name:
                taps = _identity_taps(tensors[-1].file_shape[0])
                tensors.append(NativeTensor(layer + TAPS, (), taps))
    return tensors


def own_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, PartOfTensor]:
    """Our tensors inside those of a file that has all of `native_tensors`.

    Raises:
        WeightsError: the file has a convolution, and its config none.
    """
    found = {}
    for native in native_tensors(config):
        for index, part in enumerate(native.parts):
            found[part.name] = PartOfTensor(stored[native.name], native, index)
        if not native.parts and not np.array_equal(stored[native.name].view(), native.to_file(())):
            raise WeightsError(
                f"{native.name} in {stored[native.name].file} is a convolution, but config.json says conv_size=0; "
                f"{WAY_OUT}"
            )
    return found


def layer_and_own(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.3.`, `mlp.up_proj.weight`); outside layers ("", name)."""
    found = LAYER.match(name)
    return ("", name) if found is None else (found[0], name[found.end() :])


def centred(scale: np.ndarray) -> np.ndarray:
    """s - 1 in the type of s."""
    return (scale.astype(np.float64) - 1).astype(scale.dtype)


# --- the changes: shapes and values are those of the file


def _rows(shapes: Sequence[Shape]) -> Shape:
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _part(x: np.ndarray, shapes: Sequence[Shape], index: int) -> np.ndarray:
    start = sum(shape[0] for shape in shapes[:index])
    return x[start : start + shapes[index][0]]


def _gated(head_dim: int) -> Change:
    """Rows of a head followed by as many of its gate, which are zero."""

    def join(values: Sequence[np.ndarray]) -> np.ndarray:
        heads = values[0].reshape(-1, head_dim, values[0].shape[1])
        return np.concatenate([heads, np.zeros_like(heads)], axis=1).reshape(-1, heads.shape[2])

    def split(x: np.ndarray, shapes: Sequence[Shape], index: int) -> np.ndarray:
        heads = x.reshape(-1, 2, head_dim, x.shape[1])
        if heads[:, 1].any():
            raise WeightsError(f"has gates that are not zero: the attention here has none; {WAY_OUT}")
        return heads[:, 0].reshape(shapes[0])

    return Change(lambda shapes: (2 * shapes[0][0], shapes[0][1]), join, split)


def _identity_taps(channels: int) -> Change:
    def join(values: Sequence[np.ndarray]) -> np.ndarray:
        taps = np.zeros((channels, 1, NO_CONVOLUTION_TAPS), np.float32)
        taps[..., -1] = 1
        return taps

    return Change(lambda shapes: (channels, 1, NO_CONVOLUTION_TAPS), join, _part)


STACKED = Change(_rows, np.concatenate, _part)
SAME = Change(_rows, lambda values: values[0], _part)
CENTRE = Change(_rows, lambda values: centred(values[0]), lambda x, shapes, index: x.astype(np.float32) + 1)
DOUBLE = Change(_rows, lambda values: values[0] * values[0].dtype.type(2), lambda x, shapes, index: x / x.dtype.type(2))


def _change(own: str, head_dim: int) -> Change:
    if own in CENTRED:
        return CENTRE
    return {GATED: _gated(head_dim), DOUBLED: DOUBLE}.get(own, SAME)
