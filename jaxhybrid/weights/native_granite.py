"""A student's weights as `granitemoehybrid` has them, every one as it is: some lie in one tensor there.

- An MLP's gate and up projections are one, and so are all that a Mamba-2 layer makes of its input: z, x, B, C, steps,
  which are our output gate, v, k, q and `dt_proj`. Its convolution is over x, B, C, with taps [0, .., 0, 1] for none.
- Biases that a student has not are zeros: attention has them on q, k, v and o or on none, a Mamba-2 layer on its input
  and its output or on neither. Those of q, k, v in a layer without a convolution become the convolution's.
"""

from collections.abc import Iterator, Mapping
from functools import partial

from jaxhybrid.families.feature import NO_CONVOLUTION_TAPS
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.change import NativeTensor, identity_taps, no_bias, renamed_and_joined
from jaxhybrid.weights.names import FileTensor

# Suffixes of our names after the layer's, and what becomes of the tensor.
RENAMED = {
    "mlp.down_proj.weight": "shared_mlp.output_linear.weight",
    "linear_attn.o_proj.weight": "mamba.out_proj.weight",
    "linear_attn.o_proj.bias": "mamba.out_proj.bias",
    **{f"linear_attn.{name}": f"mamba.{name}" for name in ("norm.weight", "A_log", "D", "dt_bias")},
}
CONVOLVED = "vkq"  # in the order of x, B, C
TAPS_BIAS = "mamba.conv1d.bias"
BIASES = [f"linear_attn.{name}_proj.bias" for name in CONVOLVED]  # where no convolution is
JOINED = (
    ("shared_mlp.input_linear.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
    ("mamba.in_proj.weight", [f"linear_attn.{name}_proj.weight" for name in ("g", *CONVOLVED, "dt")]),
    ("mamba.conv1d.weight", [f"linear_attn.{name}_conv.weight" for name in CONVOLVED]),
    (TAPS_BIAS, [f"linear_attn.{name}_conv.bias" for name in CONVOLVED]),
    (TAPS_BIAS, BIASES),
)


def tensors_of(config: ModelConfig) -> list[NativeTensor]:
    """Every tensor of the architecture for a model of this config, in the order of a file."""
    return renamed_and_joined(config, RENAMED, JOINED, partial(_constants, config))


def _constants(config: ModelConfig, layer: str, own: str, by_name: Mapping[str, FileTensor]) -> Iterator[NativeTensor]:
    """What the architecture has beside one of our tensors, and we have not."""
    inner = config.num_heads * config.head_dim
    if own == "self_attn.o_proj.weight" and config.qkv_bias and not config.o_bias:
        yield no_bias(f"{layer}self_attn.o_proj.bias", config.hidden_size)
    if own == "linear_attn.o_proj.weight":
        if layer + "linear_attn.v_conv.weight" not in by_name:
            yield identity_taps(f"{layer}mamba.conv1d.weight", 3 * inner, NO_CONVOLUTION_TAPS, "ssm_conv_size")
            if layer + BIASES[0] not in by_name:
                yield no_bias(layer + TAPS_BIAS, 3 * inner)
        if config.o_bias:
            yield no_bias(f"{layer}mamba.in_proj.bias", 4 * inner + config.num_states)
