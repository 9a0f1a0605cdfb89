"""Small students in all their kinds, to be exported."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.blueprint import is_variable
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, RopeConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.mixers.deltanet import DeltaNetConfig
from jaxhybrid.model.mixers.fixed_decay import FixedDecayConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.kimi_delta import KimiDeltaConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.mixers.rwkv7 import RWKV7Config
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.model.transformer import Model, model_variables

SOFT, LIN = FULL_ATTENTION, GatedDeltaNetConfig.kind
PLAIN = GatedDeltaNetConfig(qkv_bias=False, qk_norm=False)
FULL = GatedDeltaNetConfig(expand_kv=False, conv_size=4, rope=True, qkv_bias=True, qk_norm=True)
LLAMA3 = RopeConfig("llama3", 500.0, factor=8.0, original_max_position_embeddings=32)
YARN = RopeConfig("yarn", 500.0, factor=4.0, original_max_position_embeddings=16)
LENGTH, PADDING = 90, 13

CASES = {
    "llama_paper": {"rope": LLAMA3, "num_layers": 3, "layer_types": (LIN, SOFT, LIN)},
    "llama_everything": {
        "tie_embeddings": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "mixer": GatedDeltaNetConfig(expand_kv=False, conv_size=4, rope=True, qkv_bias=True, qk_norm=False),
    },
    "qwen2": {
        "family": "qwen2",
        "qkv_bias": True,
        "rope": YARN,
        "mixer": GatedDeltaNetConfig(output_gate=False, conv_size=2, qkv_bias=True, qk_norm=False),
    },
    "qwen2_bias_left": {"family": "qwen2", "qkv_bias": True, "tie_embeddings": True, "layer_types": (SOFT, LIN)},
    "qwen3": {
        "family": "qwen3",
        "qk_norm": True,
        "rope": RopeConfig("linear", 500.0, factor=2.0),
        "mixer": GatedDeltaNetConfig(expand_kv=False, conv_size=4, qkv_bias=False, qk_norm=True),
    },
    "qwen3_everything": {
        "family": "qwen3",
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "rope": RopeConfig("dynamic", 500.0, factor=4.0),
        "mixer": FULL,
        "head_dim": 32,  # heads wider than hidden_size / num_heads
    },
    "all_softmax": {"layer_types": (SOFT, SOFT), "mixer": None},
    "all_linear": {"layer_types": (LIN, LIN)},
    "gla": {"layer_types": ("gla", SOFT), "mixer": GLAConfig(qkv_bias=False, qk_norm=False, decay_rank=4)},
    "gla_everything": {
        "family": "qwen3",
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "layer_types": (SOFT, "gla"),
        "mixer": GLAConfig(expand_kv=False, rope=True, qkv_bias=True, qk_norm=True),
    },
}
# With everything that a mixer has.
CARRIED = {"rope": True, "qkv_bias": True, "qk_norm": True}
OTHER_MIXERS = {
    mixer.kind: {
        "family": "qwen3",
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "layer_types": (SOFT, mixer.kind),
        "mixer": mixer,
    }
    for mixer in (
        DeltaNetConfig(conv_size=3, expand_kv=False, **CARRIED),
        KimiDeltaConfig(conv_size=4, low_rank=64, **CARRIED),
        FixedDecayConfig(**CARRIED),
        Mamba2Config(expand_kv=False, **CARRIED),
        RWKV6Config(expand_kv=False, low_rank=64, **CARRIED),
        RWKV7Config(low_rank=64, **CARRIED),
        WindowAttentionConfig(window=8, sinks=3),
    )
}
# Students that transformers' own qwen3_5_text can express.
QWEN3_5 = {
    "family": "qwen3",
    "qk_norm": True,
    "num_layers": 3,
    "layer_types": (LIN, SOFT, LIN),
    "mixer": GatedDeltaNetConfig(qkv_bias=False, qk_norm=False, conv_size=4),
}
# Students that granitemoehybrid can express.
GRANITE = {
    "num_layers": 3,
    "layer_types": ("mamba2", SOFT, "mamba2"),
    "mixer": Mamba2Config(head_norm=True, qkv_bias=False, qk_norm=False),
}
GRANITE_CASES = {
    "granite": GRANITE | {"rope": LLAMA3, "num_layers": 4, "layer_types": ("mamba2", SOFT, SOFT, "mamba2")},
    "granite_qwen2": GRANITE
    | {
        "family": "qwen2",
        "qkv_bias": True,
        "rope": YARN,
        "tie_embeddings": True,
        "mixer": Mamba2Config(head_norm=True, qkv_bias=True, qk_norm=False, ssm_conv_size=0),
    },
    "granite_everything": GRANITE
    | {
        "family": "granite",
        "qkv_bias": True,
        "o_bias": True,
        "num_kv_heads": 4,
        "embedding_scale": 3.0,
        "residual_scale": 0.5,
        "attention_scale": 0.4,
        "logit_scale": 0.5,
        "softmax": SoftmaxConfig(rope=False),
    },
}
QWEN3_5_CASES = {
    "native": QWEN3_5 | {"rope": LLAMA3, "head_dim": 32, "num_layers": 4, "layer_types": (LIN, SOFT, LIN, SOFT)},
    "native_without_convolution": QWEN3_5
    | {"rope": YARN, "tie_embeddings": True, "mixer": PLAIN, "num_kv_heads": 4, "layer_types": (SOFT, LIN, LIN)},
}
# Students that their teacher's own architecture can express.
WINDOWS = {
    "family": "qwen2",
    "qkv_bias": True,
    "num_layers": 3,
    "layer_types": ("window_attention", SOFT, "window_attention"),
    "mixer": WindowAttentionConfig(window=8),
}
WINDOW_CASES = {
    "windows_qwen2": WINDOWS | {"rope": YARN, "tie_embeddings": True},
    "windows_qwen3": WINDOWS
    | {"family": "qwen3", "qk_norm": True, "o_bias": True, "head_dim": 32, "layer_types": ("window_attention",) * 3},
    "windows_ministral": WINDOWS | {"family": "ministral", "qkv_bias": False, "window": WindowConfig(8, (0, 1))}
    | {"num_layers": 4, "layer_types": (SOFT, SOFT, SOFT, "window_attention")},
    "windows_olmo3": WINDOWS | {"family": "olmo3", "qkv_bias": False, "norms": "after", "qk_norm": True}
    | {"wide_qk_norm": True, "rope": YARN, "window": WindowConfig(12, (0, 2), RopeConfig(theta=1000.0))},
}  # fmt: skip
NATIVE_CASES = QWEN3_5_CASES | GRANITE_CASES | WINDOW_CASES


def make_student(folder, *, least_scale=None, **changes):
    """least_scale: of norms; 1/2 makes qwen3_5_text exact without more ado."""
    settings = {
        "family": "llama",
        "vocab_size": 61,
        "hidden_size": 64,  # 4-bit layers want multiples of 64
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "norm_eps": 1e-4,  # a smaller one magnifies float32 rounding where a linear layer's output is small
        "max_position_embeddings": 64,
        "layer_types": (LIN, SOFT),
        "mixer": PLAIN,
    }
    config = ModelConfig(**settings | changes)
    rng = np.random.default_rng(0)

    def draw(path, spec):
        name, noise = path[-1].key, rng.standard_normal(spec.shape)
        if name in ("A_log", "dt_bias"):
            values = noise
        elif name == "scale":
            values = np.maximum(1 + 0.3 * noise, -np.inf if least_scale is None else least_scale)
        else:  # projections, taps, biases: large enough that none of them is without effect
            values = 0.1 * noise
        return jnp.asarray(values, jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, model_variables(config), is_leaf=is_variable)
    return Model(params, config, str(folder))
