"""Exports in transformers' own granitemoehybrid: what it can express, that nothing changes, and the way back.

That transformers computes what we do, in the oldest version that it is for and the newest, is in test_reading.py.
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GraniteMoeHybridForCausalLM

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.export.folder import export
from jaxhybrid.export.form import choose, why_not_native
from jaxhybrid.families import FAMILIES
from jaxhybrid.families.native_granite import features
from jaxhybrid.families.native_olmo import features as olmo_features
from jaxhybrid.model.config import RopeConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.weights.huggingface import load_student
from tests.export.rounding import errors_in_16_bits, logits, read
from tests.export.students import GRANITE, GRANITE_CASES, SOFT, make_student

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:No tokenizer")
MIXER = GRANITE["mixer"]


@pytest.fixture
def native(tmp_path):
    return export(make_student("", **GRANITE_CASES["granite_qwen2"]), tmp_path / "native", dtype="float32")


# --- what it can express


@pytest.mark.parametrize(
    ("changes", "feature", "remedy"),
    [
        ({"qk_norm": True, "family": "qwen3"}, "query and key norms", ""),
        ({"o_bias": True, "family": "seed_oss"}, "bias on o alone", ""),
        ({"mlp_bias": True}, "biases in the MLP", ""),
        ({"head_dim": 32}, "width of a head", ""),
        ({"layer_types": ("mamba2",) * 3}, "softmax layers", "select.budget"),
        ({"layer_types": (SOFT,) * 3}, "linear layers", "mixer.kind=mamba2"),
        ({"rope": RopeConfig("dynamic", factor=2.0)}, "rotary scaling", ""),
        ({"rope": RopeConfig(partial=0.5)}, "rotated share of a head", ""),
        ({"softmax": SoftmaxConfig(length_scale=64.0)}, "queries scaled by length", "softmax.length_scale=null"),
        ({"window": WindowConfig(8, (1,))}, "window", ""),
        ({"unrotated_layers": (1,)}, "unrotated_layers", ""),
        ({"activation": "gelu_tanh"}, "activation", ""),
        ({"norms": "after"}, "norms", ""),
        ({"logit_cap": 30.0}, "logit_cap", ""),
        ({"mixer": replace(MIXER, qk_norm=True)}, "query and key norms of linear layers", "mixer.qk_norm=false"),
        (
            {"mixer": replace(MIXER, qkv_bias=True)},
            "biases before a convolution",
            "mixer.ssm_conv_size=0 or mixer.qkv_bias=false",
        ),
        ({"mixer": replace(MIXER, rope=True)}, "rotary embedding of linear layers", "mixer.rope=false"),
        ({"mixer": replace(MIXER, output_gate=False)}, "output gate of linear layers", "mixer.output_gate=true"),
        ({"mixer": replace(MIXER, expand_kv=False)}, "states of linear layers", "mixer.expand_kv=true"),
        ({"mixer": replace(MIXER, head_norm=False)}, "norm of each head by itself", "mixer.head_norm=true"),
    ],
)
def test_what_stands_against_it_is_named(changes, feature, remedy):
    model = make_student("", **GRANITE)
    model = replace(model, config=replace(model.config, **changes))
    assert [(found.name, found.remedy) for found in features(model.config) if not found.fits] == [(feature, remedy)]
    form = choose(model, "float32", "auto")
    assert form.native is None
    assert feature in form.told
    assert remedy in form.told
    with pytest.raises(ConfigError, match=f"(?s)'native' is not possible.*{feature}"):
        choose(model, "float32", "native")


def test_why_not_every_architecture_is_told():
    """The nearest first; of olmo_hybrid norms that no model has, before and after at once."""
    told = why_not_native(make_student("", **GRANITE | {"mixer": replace(MIXER, head_norm=False)}).config)
    headings = [line for line in told.splitlines() if line.startswith("transformers' own")]
    assert [line.split()[2] for line in headings] == ["granitemoehybrid", "qwen3_5_text", "olmo_hybrid"]
    assert "linear layers" in told.split("qwen3_5_text")[1]
    plain = GatedDeltaNetConfig(qkv_bias=False, qk_norm=False)
    olmo = {
        "family": "olmo2",
        "norms": "after",
        "qk_norm": True,
        "wide_qk_norm": True,
        "mixer": plain,
        "norm_eps": 1e-6,
    }
    against = [found for found in olmo_features(make_student("", **olmo).config) if not found.fits]
    assert [(one.name, one.here, one.there) for one in against] == [
        ("norms of linear layers", "after mixer and MLP", "before mixer and MLP"),
        ("epsilon of their output norm", "1e-06", "1e-05"),
    ]
    before = [one.name for one in olmo_features(make_student("").config) if not one.fits]
    assert before == ["norms of softmax layers", "query and key norms", "epsilon of their output norm"]


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral", "qwen2", "granite", "internlm3", "seed_oss"])
def test_families_that_it_expresses(tmp_path, family):
    """Their own keys and its are in one file, and neither takes the other's place."""
    biases = {"qkv_bias": True} if family == "qwen2" else {}
    mixer = replace(MIXER, qkv_bias=bool(biases), ssm_conv_size=0)
    # Longer than the window that Mistral has where a config is silent.
    changes = {"family": family, "mixer": mixer, "max_position_embeddings": 8192}
    student = make_student("", **GRANITE | changes | biases)
    folder = export(student, tmp_path / "native", format="native")
    assert load_student(folder).config == student.config
    config = GraniteMoeHybridForCausalLM.config_class.from_pretrained(folder)
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert (config.attention_bias, config.mamba_proj_bias, config.tie_word_embeddings) == (bool(biases), False, False)
    assert getattr(config, "sliding_window", None) is None
    assert family in FAMILIES


# --- nothing changes


def test_exports_in_16_bits_compute_the_same_bits(tmp_path):
    """No tensor is another number than in the form with our own code."""
    student = make_student("", **GRANITE)
    plain = load_student(export(student, tmp_path / "plain", format="remote-code"))
    native = load_student(export(student, tmp_path / "native"))
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "granitemoehybrid"
    jax.tree.map(np.testing.assert_array_equal, native.params, plain.params)


def test_logits_of_its_own_class(tmp_path):
    """In float32 they equal ours. In bfloat16 their RMS difference to those is no more than with the model's own code,
    which keeps steps in float32, and near a softmax model's of the same shape; weights are the same in all."""
    student = make_student("", **GRANITE)
    softmax = make_student("", **GRANITE | {"layer_types": (SOFT,) * 3, "mixer": None})
    native, own_code, teacher = errors_in_16_bits(tmp_path, student, softmax)
    model, theirs = read(tmp_path / "native", torch.float32)
    exact = logits(load_student(tmp_path / "native"))
    assert type(model) is GraniteMoeHybridForCausalLM
    assert exact.std() > 0.3
    assert np.abs(theirs - exact).max() < 1e-4
    assert 0.001 < native < 1.1 * own_code
    assert max(native, own_code) < 1.5 * teacher


# --- the way back


@pytest.mark.parametrize("case", GRANITE_CASES)
def test_it_is_read_back_exactly(tmp_path, case):
    student = make_student("", **GRANITE_CASES[case])
    again = load_student(export(student, tmp_path / "native", dtype="float32", max_shard_bytes=50_000))
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    rotated = json.loads((tmp_path / "native" / "config.json").read_text())["position_embedding_type"] == "rope"
    assert rotated == student.config.softmax.rope
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)


def test_what_transformers_saved_is_read_too(native, tmp_path):
    AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path / "saved")
    again = load_student(tmp_path / "saved")
    assert again.config == load_student(native).config
    jax.tree.map(np.testing.assert_array_equal, again.params, load_student(native).params)


def test_changes_made_elsewhere_are_refused(native):
    file = native / "model.safetensors"
    tensors, config = load_file(file), json.loads((native / "config.json").read_text())
    bias = "model.layers.1.self_attn.o_proj.bias"
    save_file(tensors | {bias: tensors[bias] + 1}, file)
    with pytest.raises(WeightsError, match=rf"{bias} in .* is not zero, but by config\.json there is no such bias"):
        load_student(native)
    taps = "model.layers.0.mamba.conv1d.weight"
    save_file(tensors | {taps: tensors[taps] * 2}, file)
    with pytest.raises(WeightsError, match=r"is a convolution, but config\.json says ssm_conv_size=0"):
        load_student(native)
    save_file({name: value for name, value in tensors.items() if not name.endswith("in_proj.weight")}, file)
    with pytest.raises(WeightsError, match=r"lacks model\.layers\.0\.mamba\.in_proj\.weight"):
        load_student(native)
    save_file(tensors, file)

    def write(**changes):
        (native / "config.json").write_text(json.dumps(config | changes))

    write(mamba_n_groups=1)
    with pytest.raises(ConfigError, match="mamba_n_groups=1; the other keys say 4"):
        load_student(native)
    write(attention_multiplier=1.0)
    with pytest.raises(ConfigError, match=r"attention_multiplier=1\.0; the other keys say 0\.25"):
        load_student(native)
    write(time_step_limit=[0.0, 0.1])
    with pytest.raises(ConfigError, match=r"time_step_limit=\[0\.0, 0\.1\], which is not known"):
        load_student(native)
    del config["base_model_type"]
    write()
    with pytest.raises(ConfigError, match="base_model_type"):
        load_student(native)
