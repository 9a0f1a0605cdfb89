"""Qwen2 and Qwen2.5: biases on q, k and v, always; none on o."""

from jaxhybrid.families.base import WINDOW_KEYS, Family, kinds_by_switch, switch_keys

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    flags=lambda hf: {"qkv_bias": True},
    flag_keys=switch_keys,
    own_keys=WINDOW_KEYS,
    defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    kinds=kinds_by_switch,
)
