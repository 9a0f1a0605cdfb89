"""A student's weights in the architectures that transformers has itself."""

from collections.abc import Callable, Mapping

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.families.native import GRANITE_HYBRID, QWEN3_5
from jaxhybrid.families.native_windows import SLIDING
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights import native_granite, native_qwen3_5
from jaxhybrid.weights.change import SAME, WAY_OUT, NativeTensor, PartOfTensor
from jaxhybrid.weights.names import file_tensors
from jaxhybrid.weights.safetensors import StoredTensor


def _as_attention(config: ModelConfig) -> list[NativeTensor]:
    """Of sliding windows: every tensor as it is, under the name of attention."""
    tensors = file_tensors(config)
    return [NativeTensor(one.name.replace(".linear_attn.", ".self_attn."), (one,), SAME) for one in tensors]


TENSORS: Mapping[str, Callable[[ModelConfig], list[NativeTensor]]] = {
    QWEN3_5: native_qwen3_5.tensors_of,
    GRANITE_HYBRID: native_granite.tensors_of,
    **dict.fromkeys(SLIDING, _as_attention),
}


def native_tensors(config: ModelConfig, model_type: str) -> list[NativeTensor]:
    """Every tensor of the architecture for a model of this config, in the order of a file."""
    return TENSORS[model_type](config)


def own_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig, model_type: str) -> dict[str, PartOfTensor]:
    """Our tensors inside those of a file that has all of `native_tensors`.

    Raises:
        WeightsError: the file has a convolution or a bias where its config has none.
    """
    found = {}
    for native in native_tensors(config, model_type):
        for index, part in enumerate(native.parts):
            found[part.name] = PartOfTensor(stored[native.name], native, index)
        if not native.parts and not np.array_equal(stored[native.name].view(), native.to_file(())):
            raise WeightsError(f"{native.name} in {stored[native.name].file} {native.other}; {WAY_OUT}")
    return found
