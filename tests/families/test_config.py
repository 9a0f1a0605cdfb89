"""Config keys: read, written, read again; and everything that is not understood refused by name."""

import dataclasses

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from jaxhybrid.errors import ConfigError
from jaxhybrid.families import FAMILIES, config_to_hf, hf_to_config, hf_to_student_config, student_config_to_hf
from jaxhybrid.model.config import FULL_ATTENTION, RopeConfig, WindowConfig
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HF_CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
FOUR = tuple(HF_CLASSES)  # tests/families/test_every_family.py has all of them


def base(family="llama", **changes):
    own = {"sliding_window": None} if family == "mistral" else {}  # a silent config has one of 4096
    return {"model_type": family, **SHAPE, **own, **changes}


PASSED_OVER = {
    "dual_chunk_attention_config": {"chunk_size": 8, "local_size": 2, "original_max_position_embeddings": 8},
    "max_sequence_length": 8,
    "internal_version": 2,
    "gradient_checkpointing": True,
}


def refused(config, *parts, **options):
    with pytest.raises(ConfigError) as error:
        hf_to_config(config, **options)
    for part in parts:
        assert part in str(error.value), str(error.value)


# --- what a config means


@pytest.mark.parametrize("family", FOUR)
def test_absent_keys_take_transformers_defaults(family):
    bare = {key: value for key, value in base(family).items() if key != "max_position_embeddings"}
    ours, theirs = hf_to_config(bare), HF_CLASSES[family](**{k: v for k, v in bare.items() if k != "model_type"})
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", 16)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])


def test_heads():
    assert hf_to_config(base(num_key_value_heads=None)).num_kv_heads == 4
    llama = base()
    del llama["num_key_value_heads"]
    assert hf_to_config(llama).num_kv_heads == 4
    assert hf_to_config(base(head_dim=24)).head_dim == 24
    assert hf_to_config(base("qwen3")).head_dim == 128
    assert hf_to_config(base("mistral", head_dim=24)).head_dim == 24  # as Nemo
    refused(base(hidden_size=66, head_dim=None), "hidden_size=66", "head_dim")
    refused(base(num_key_value_heads=3), "num_kv_heads 3")
    qwen = base("qwen2")
    del qwen["num_key_value_heads"]
    refused(qwen, "num_key_value_heads")


def test_biases_and_norms_of_the_families():
    def flags(config):
        return config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm

    assert flags(hf_to_config(base())) == (False, False, False, False)
    assert flags(hf_to_config(base(attention_bias=True, mlp_bias=True))) == (True, True, True, False)
    assert flags(hf_to_config(base("mistral"))) == (False, False, False, False)
    assert flags(hf_to_config(base("qwen2"))) == (True, False, False, False)
    assert flags(hf_to_config(base("qwen2", attention_bias=False))) == (True, False, False, False)
    assert flags(hf_to_config(base("qwen3"))) == (False, False, False, True)
    assert flags(hf_to_config(base("qwen3", attention_bias=True))) == (True, True, False, True)


YARN_KEYS = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2,
    "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False,
}  # fmt: skip
LLAMA3_KEYS = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": ({"rope_type": "default"}, RopeConfig(theta=5000.0)),
    "linear": ({"rope_type": "linear", "factor": 2.0}, RopeConfig("linear", 5000.0, 2.0)),
    "legacy name": ({"type": "linear", "factor": 2.0}, RopeConfig("linear", 5000.0, 2.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2}, RopeConfig("dynamic", 5000.0, 2)),
    "dynamic, same length": (
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256},
        RopeConfig("dynamic", 5000.0, 2.0),
    ),
    "llama3": (
        {**LLAMA3_KEYS, "original_max_position_embeddings": 64},
        RopeConfig("llama3", 5000.0, 8.0, 64, 1.0, 4.0),
    ),
    "llama3 without length": (LLAMA3_KEYS, RopeConfig("llama3", 5000.0, 8.0, 256, 1.0, 4.0)),
    "yarn": (
        YARN_KEYS,
        RopeConfig(
            "yarn", 5000.0, 4.0, 64, beta_fast=16, beta_slow=2, attention_factor=1.2, mscale=1.0, mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "yarn from the two lengths": (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
        RopeConfig("yarn", 5000.0, 4.0, 64),
    ),
    "yarn, zero is absent": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 0},
        RopeConfig("yarn", 5000.0, 4.0, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_rules(name):
    keys, expected = ROPES[name]
    assert hf_to_config(base(rope_parameters={**keys, "rope_theta": 5000.0})).rope == expected
    assert hf_to_config(base(rope_theta=5000.0, rope_scaling=keys)).rope == expected
    assert hf_to_config(base(rope_theta=9.0, rope_parameters={**keys, "rope_theta": 5000.0})).rope == expected
    assert hf_to_config(config_to_hf(hf_to_config(base(rope_theta=5000.0, rope_scaling=keys)))).rope == expected


def test_length_beside_the_rope_settings_wins():
    keys = {**LLAMA3_KEYS, "original_max_position_embeddings": 64}
    rope = hf_to_config(base(rope_scaling=keys, original_max_position_embeddings=32)).rope
    assert rope.original_max_position_embeddings == 32


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0]}, ("longrope", "lacks long_factor")),
        ({"rope_type": "proportional"}, ("proportional",)),
        ({"type": "su"}, ("'su'",)),
        ({"rope_type": "default", "mrope_section": [1, 2]}, ("mrope_section=[1, 2]",)),
        ({"rope_type": "linear"}, ("lacks factor",)),
        ({"rope_type": "llama3", "factor": 8.0}, ("low_freq_factor, high_freq_factor",)),
        ({"rope_type": "linear", "factor": "2"}, ("factor='2'",)),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, ("beta_fast=3",)),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, ("=64", "256")),
        ({"full_attention": {"rope_type": "default"}}, ("full_attention", "layer type")),
        ({"rope_type": "longrope", "short_factor": ["1"], "long_factor": [1.0]}, ("short_factor=['1']",)),
        ("yarn", ("'yarn'",)),
    ],
)
def test_rope_refused(keys, parts):
    refused(base(rope_parameters=keys), "rope_parameters", *parts)
    refused(base(rope_scaling=keys), "rope_scaling", *parts)


def test_partial_rotation_beside_the_rope_settings():
    assert hf_to_config(base(partial_rotary_factor=1.0)) == hf_to_config(base())
    refused(base(partial_rotary_factor=0.25), "partial_rotary_factor=0.25")


# --- refusals


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "8", True])
def test_sizes_must_be_positive_integers(key, value):
    refused(base(**{key: value}), key)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("llama", {"hidden_act": "gelu"}, ("hidden_act='gelu'", "silu")),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
        ("llama", {"sliding_window": 4096}, ("sliding_window=4096", "ignore_config_keys=('sliding_window',)")),
        ("qwen2", {"use_sliding_window": True, "sliding_window": "9", "max_window_layers": 1}, ("sliding_window='9'",)),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ("sliding_attention",)),
        ("qwen3", {"layer_types": ["full_attention"]}, ("1 entries", "2")),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, ("linear_attention",)),
        ("qwen2", {"mlp_bias": True}, ("mlp_bias=True", "qwen2")),
        ("qwen2", {"attention_bias": True}, ("attention_bias=True", "qwen2")),
        ("llama", {"use_qk_norm": True}, ("use_qk_norm=True",)),
        ("llama", {"logit_scale": 0.5}, ("logit_scale=0.5",)),
        ("llama", {"num_local_experts": 8}, ("num_local_experts=8",)),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, ("auto_map",)),
        ("llama", {"rope_interleaved": True}, ("rope_interleaved=True",)),
        ("llama", {"attention_bias": "yes"}, ("attention_bias='yes'",)),
        ("llama", {"rms_norm_eps": 0}, ("rms_norm_eps=0",)),
        ("phimoe", {}, ("'phimoe'", ", ".join(FAMILIES))),
        ("mistral", {"attention_bias": True}, ("attention_bias=True", "mistral")),
        ("mistral", {"sliding_window": True}, ("sliding_window=True",)),
        ("mistral", {"sliding_window": 0}, ("sliding_window=0",)),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, ("does not read the key",)),
    ],
)
def test_refused_by_name_and_value(family, changes, parts):
    refused(base(family, **changes), *parts)


def test_no_model_type():
    refused({}, "model_type", ", ".join(FAMILIES))


def test_a_window_as_long_as_the_context_cannot_act():
    assert hf_to_config(base("mistral", sliding_window=256)) == hf_to_config(base("mistral"))  # as Ministral 8B
    silent = base("mistral", max_position_embeddings=8192)
    del silent["sliding_window"]
    assert hf_to_config(silent).window == WindowConfig(4096, (0, 1))
    assert hf_to_config(silent | {"max_position_embeddings": 4096}).window is None


def test_harmless_and_silent_keys():
    plain = hf_to_config(base())
    silent = {"logit_scale": None, "rope_interleaved": False, "pruned_heads": {}, "is_llama_config": True}
    bookkeeping = {"torch_dtype": "bfloat16", "eos_token_id": [1, 2], "attention_dropout": 0.1}
    assert hf_to_config(base(**silent, **bookkeeping)) == plain
    # Without effect in transformers, see tests/weights/test_teacher.py.
    assert hf_to_config(base("qwen2", **PASSED_OVER)) == hf_to_config(base("qwen2"))
    assert hf_to_config(base(**PASSED_OVER)) == plain
    qwen = base("qwen2", use_sliding_window=False, sliding_window=4096, max_window_layers=1)
    assert hf_to_config(qwen) == hf_to_config(base("qwen2"))


def test_ignored_keys():
    assert hf_to_config(base(my_note=3), ["my_note"]) == hf_to_config(base())
    refused(base(my_note=3, other=4), "other=4", ignore_config_keys=["my_note"])
    refused(base(hidden_act="gelu"), "hidden_act", ignore_config_keys=["hidden_act"])


R1_QWEN3_8B = {  # DeepSeek-R1-0528-Qwen3-8B
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attn_factor": 0.8782488562869419,
}  # fmt: skip


@pytest.mark.parametrize("source", ["rope_scaling", "rope_parameters"])
def test_a_nested_key_may_be_ignored(source):
    known = {name: value for name, value in R1_QWEN3_8B.items() if name != "attn_factor"}
    config = base("qwen3", **{source: R1_QWEN3_8B})
    expected = hf_to_config(base("qwen3", **{source: known}))
    assert hf_to_config(config, [f"{source}.attn_factor"]) == expected
    refused(config, f"{source}.attn_factor=0.878", ignore_config_keys=["attn_factor"])
    for needed in ("factor", "attention_factor"):
        refused(config, f"{source}.{needed}", "depends on", ignore_config_keys=[f"{source}.{needed}"])


def test_an_unknown_factor_of_attention_is_explained():
    """transformers passes attn_factor over and takes 0.1 ln(factor) + 1; others multiply the two."""
    config = base("qwen3", rope_scaling=R1_QWEN3_8B)
    refused(
        config,
        "rope_scaling.attn_factor=0.8782488562869419",
        "transformers passes it over and scales attention by 1.138629",
        "ignore_config_keys=('rope_scaling.attn_factor',)",
        '"attention_factor": 1.0 in its place',
    )
    refused(
        base(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 3}),
        "rope_scaling.beta_fast=3",
        "ignore_config_keys=('rope_scaling.beta_fast',)",
    )


# --- written and read again


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("tie", [False, True])
def test_config_round_trip(family, tie):
    config = hf_to_config(base(family, head_dim=20, tie_word_embeddings=tie, rms_norm_eps=1e-5))
    hf = config_to_hf(config)
    assert hf_to_config(hf) == config
    theirs = HF_CLASSES[family](**{k: v for k, v in hf.items() if k not in ("model_type", "architectures")})
    assert hf_to_config(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"o_bias": True}),
        ("llama", {"qk_norm": True}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen2", {"o_bias": True}),
        ("qwen2", {"mlp_bias": True}),
        ("qwen3", {"qk_norm": False}),
        ("qwen3", {"mlp_bias": True}),
    ],
)
def test_what_a_family_cannot_say(family, changes):
    config = dataclasses.replace(hf_to_config(base(family)), **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config_to_hf(config)


MIXERS = [
    GatedDeltaNetConfig(qkv_bias=False, qk_norm=False),
    GatedDeltaNetConfig(
        expand_kv=False, output_gate=False, conv_size=4, rope=True, qkv_bias=True, qk_norm=True, gate_init="value",
        decay_init="slow",
    ),
    GLAConfig(qkv_bias=False, qk_norm=False, decay_rank=4),
    *(
        LINEAR_MIXERS[kind].Config(qkv_bias=False, qk_norm=False)
        for kind in ("deltanet", "kimi_delta", "fixed_decay", "mamba2", "rwkv6", "rwkv7")
    ),
    WindowAttentionConfig(window=9, sinks=2),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_student_round_trip(family, mixer):
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    teacher = base(family, rope_parameters=rope, eos_token_id=7, torch_dtype="bfloat16", transformers_version="4.40.0")
    config = dataclasses.replace(hf_to_config(teacher), layer_types=(mixer.kind, FULL_ATTENTION), mixer=mixer)
    hf = student_config_to_hf(config, teacher)
    assert hf["model_type"] == "jaxhybrid"
    assert hf["base_model_type"] == family
    assert hf["layer_types"] == ["linear_attention", "full_attention"]
    assert hf["linear_mixer"] == mixer.kind
    assert hf[mixer.kind] == dataclasses.asdict(mixer)
    assert hf["eos_token_id"] == 7
    assert not {"torch_dtype", "transformers_version", "rope_scaling", "rope_theta", "architectures"} & set(hf)
    assert all(hf[key] == value for key, value in SHAPE.items())
    assert hf_to_student_config(hf) == config
    assert hf_to_student_config(student_config_to_hf(config, {})) == config
    assert student_config_to_hf(config, {"pad_token_id": 100})["pad_token_id"] == 100
    assert "pad_token_id" not in student_config_to_hf(config, {"pad_token_id": 101})  # beyond the embedding


def test_student_settings_refused():
    config = dataclasses.replace(
        hf_to_config(base()), layer_types=(GatedDeltaNetConfig.kind,) * 2, mixer=MIXERS[0]
    )  # fmt: skip
    hf = student_config_to_hf(config, {})
    for changes, part in (
        ({"base_model_type": "gpt2"}, "gpt2"),
        ({"layer_types": ["mamba", "full_attention"]}, "mamba"),
        ({"layer_types": ["linear_attention"]}, "1 layers"),
        ({"layer_types": None}, "layer_types"),
        ({"gated_deltanet": None}, "gated_deltanet"),
        ({"gated_deltanet": {"expand_v": 2}}, "expand_v"),
        ({"gla": {"decay_rank": 4}}, "gated_deltanet and gla"),
        ({"strange": 1}, "strange=1"),
    ):
        with pytest.raises(ConfigError, match=part):
            hf_to_student_config(hf | changes)


def test_a_familys_defaults_and_names_are_all_read():
    family = dataclasses.replace(
        FAMILIES["llama"], defaults={"rms_norm_eps": 0.5, "tie_word_embeddings": True, "max_position_embeddings": 7},
        own_names={"input_norm": "norm_1"},
    )  # fmt: skip
    hf = {key: value for key, value in base().items() if key not in family.defaults}
    config = family.read_config(hf)
    assert (config.norm_eps, config.tie_embeddings, config.max_position_embeddings) == (0.5, True, 7)
    assert (family.names["input_norm"], family.names["embed"]) == ("norm_1", "model.embed_tokens")
