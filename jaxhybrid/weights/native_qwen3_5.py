"""A student's weights as `qwen3_5_text` has them: the same function, by other tensors.

- A norm's scale s is stored as s - 1; that of a linear layer's output as it is.
- Softmax attention is multiplied by sigmoid(gate) before o_proj: gate rows of zero give 1/2, and o_proj is doubled.
- A linear layer's q, k and v lie in one tensor, and so do their convolutions; taps [0, .., 0, 1] are no convolution.

Every step is exact but one: s - 1 rounds for some s below 1/2. There powers of two help: see `fold.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.families.feature import NO_CONVOLUTION_TAPS
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.change import SAME, WAY_OUT, Change, NativeTensor, identity_taps, renamed_and_joined, rows
from jaxhybrid.weights.names import FileTensor, Shape

# Suffixes of our names after the layer's, and what becomes of the tensor.
RENAMED = {
    "linear_attn.g_proj.weight": "linear_attn.in_proj_z.weight",
    "linear_attn.a_proj.weight": "linear_attn.in_proj_a.weight",
    "linear_attn.b_proj.weight": "linear_attn.in_proj_b.weight",
    "linear_attn.o_norm.weight": "linear_attn.norm.weight",
    "linear_attn.o_proj.weight": "linear_attn.out_proj.weight",
}
PROJECTIONS, CONVOLUTIONS = ([f"linear_attn.{name}_{part}.weight" for name in "qkv"] for part in ("proj", "conv"))
TAPS = "linear_attn.conv1d.weight"
JOINED = (("linear_attn.in_proj_qkv.weight", PROJECTIONS), (TAPS, CONVOLUTIONS))
CENTRED = (
    *("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
)
GATED, DOUBLED = "self_attn.q_proj.weight", "self_attn.o_proj.weight"


def tensors_of(config: ModelConfig) -> list[NativeTensor]:
    """Every tensor of the architecture for a model of this config, in the order of a file."""
    return renamed_and_joined(config, RENAMED, JOINED, _taps, partial(_change, config.head_dim))


def _taps(layer: str, own: str, by_name: Mapping[str, FileTensor]) -> Iterator[NativeTensor]:
    """Of a layer without a convolution."""
    if own == PROJECTIONS[0] and layer + CONVOLUTIONS[0] not in by_name:
        channels = sum(by_name[layer + part].file_shape[0] for part in PROJECTIONS)
        yield identity_taps(layer + TAPS, channels, NO_CONVOLUTION_TAPS, "conv_size")


def centred(scale: np.ndarray) -> np.ndarray:
    """s - 1 in the type of s."""
    return (scale.astype(np.float64) - 1).astype(scale.dtype)


# --- the changes: shapes and values are those of the file


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


CENTRE = Change(rows, lambda values: centred(values[0]), lambda x, shapes, index: x.astype(np.float32) + 1)
DOUBLE = Change(rows, lambda values: values[0] * values[0].dtype.type(2), lambda x, shapes, index: x / x.dtype.type(2))


def _change(head_dim: int, own: str) -> Change:
    if own in CENTRED:
        return CENTRE
    return {GATED: _gated(head_dim), DOUBLED: DOUBLE}.get(own, SAME)
