"""A tensor of an architecture of transformers' own, made of ours, and ours inside it again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.names import FileTensor, Shape, file_tensors, layer_and_own
from jaxhybrid.weights.safetensors import StoredTensor

WAY_OUT = "it was changed after jaxhybrid exported it, and is for transformers alone."


class Change(NamedTuple):
    """How a tensor of the architecture is made of ours, and the way back; all in the file's layout."""

    shape: Callable[[Sequence[Shape]], Shape]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray, Sequence[Shape], int], np.ndarray]  # part i of ours


@dataclass(frozen=True)
class NativeTensor:
    """A tensor of the architecture, of `parts` of ours; without any it is a constant, and `other` says what else is."""

    name: str
    parts: tuple[FileTensor, ...]
    change: Change
    other: str = ""

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


def rows(shapes: Sequence[Shape]) -> Shape:
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def part(x: np.ndarray, shapes: Sequence[Shape], index: int) -> np.ndarray:
    start = sum(shape[0] for shape in shapes[:index])
    return x[start : start + shapes[index][0]]


STACKED = Change(rows, np.concatenate, part)
SAME = Change(rows, lambda values: values[0], part)


def renamed_and_joined(
    config: ModelConfig,
    renamed: Mapping[str, str],
    joined: Sequence[tuple[str, Sequence[str]]],
    beside: Callable[[str, str, Mapping[str, FileTensor]], Iterable[NativeTensor]],
    change: Callable[[str], Change] = lambda own: SAME,
) -> list[NativeTensor]:
    """Every tensor of an architecture for a model of this config, in the order of a file.

    Args:
        renamed: other names, without the layer's, of tensors that stay by themselves.
        joined: tensors of the architecture that are some of ours, one below the other.
        beside: constants that come after one of ours: of its layer's name, its own and all of ours by name.
        change: of a tensor that stays by itself.
    """
    by_name = {tensor.name: tensor for tensor in file_tensors(config)}
    tensors: list[NativeTensor] = []
    for tensor in by_name.values():
        layer, own = layer_and_own(tensor.name)
        whole, parts = next((one for one in joined if own in one[1]), ("", ()))
        if not whole:
            tensors.append(NativeTensor(layer + renamed.get(own, own), (tensor,), change(own)))
        elif own == parts[0]:
            tensors.append(NativeTensor(layer + whole, tuple(by_name[layer + part] for part in parts), STACKED))
        tensors += beside(layer, own, by_name)
    return tensors


def identity_taps(name: str, channels: int, taps: int, setting: str) -> NativeTensor:
    """A convolution [channels,1,taps] that passes the current token through, for a model that has none."""

    def join(values: Sequence[np.ndarray]) -> np.ndarray:
        x = np.zeros((channels, 1, taps), np.float32)
        x[..., -1] = 1
        return x

    change = Change(lambda shapes: (channels, 1, taps), join, part)
    return NativeTensor(name, (), change, f"is a convolution, but config.json says {setting}=0")


def no_bias(name: str, width: int) -> NativeTensor:
    """A bias of zeros, for a model that has none there."""
    change = Change(lambda shapes: (width,), lambda values: np.zeros(width, np.float32), part)
    return NativeTensor(name, (), change, "is not zero, but by config.json there is no such bias")
