"""A student's weights as `qwen3_5_text` has them: the same function, by other tensors.

- A norm's scale s is stored as s - 1; that of a linear layer's output as it is.
- Softmax attention is multiplied by sigmoid(gate) before o_proj: gate rows of zero give 1/2, and o_proj is doubled.
- A linear layer's q, k and v lie in one tensor, and so do their convolutions; taps [0, .., 0, 1] are no convolution.

Every step is exact but one: s - 1 rounds for some s below 1/2. There powers of two help: see `fold.py`.
"""

from collections.abc import Sequence

import numpy as np

from jaxhybrid.errors import WeightsError
from jaxhybrid.families.native_qwen3_5 import NO_CONVOLUTION_TAPS
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.change import SAME, STACKED, WAY_OUT, Change, NativeTensor, identity_taps, rows
from jaxhybrid.weights.names import Shape, file_tensors, layer_and_own

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


def tensors_of(config: ModelConfig) -> list[NativeTensor]:
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
                channels = tensors[-1].file_shape[0]
                tensors.append(identity_taps(layer + TAPS, channels, NO_CONVOLUTION_TAPS, "conv_size"))
    return tensors


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


def _change(own: str, head_dim: int) -> Change:
    if own in CENTRED:
        return CENTRE
    return {GATED: _gated(head_dim), DOUBLED: DOUBLE}.get(own, SAME)
