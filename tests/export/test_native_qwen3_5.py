"""Exports in transformers' own qwen3_5_text: what they can express, that nothing is rounded, and the way back.

That transformers computes what we do, in its oldest and newest version, is in test_reading.py.
"""

import json
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.export.folder import export
from jaxhybrid.export.form import choose
from jaxhybrid.families.native_qwen3_5 import attention_interval, features
from jaxhybrid.model.config import ExpertsConfig, ModelConfig, RopeConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.weights.fold import _factor, _is_exact, _pair_factor
from jaxhybrid.weights.huggingface import load_student
from tests.export.rounding import errors_in_16_bits, logits
from tests.export.students import LIN, QWEN3_5, QWEN3_5_CASES, SOFT, make_student

torch.set_num_threads(1)
MIXER = QWEN3_5["mixer"]


def with_scales(model, draw):
    """The model with other norms: `draw` gives scales of a shape."""

    def change(path, x):
        return jnp.asarray(draw(x.shape), jnp.float32) if path[-1].key == "scale" else x

    return replace(model, params=jax.tree_util.tree_map_with_path(change, model.params))


@pytest.fixture
def native(tmp_path, teacher_folder):
    return export(make_student(teacher_folder, least_scale=0.5, **QWEN3_5), tmp_path / "native", dtype="float32")


# --- what it can express


@pytest.mark.parametrize(
    ("changes", "feature", "remedy"),
    [
        ({"qk_norm": False, "family": "llama"}, "query and key norms", ""),
        ({"qkv_bias": True, "o_bias": True}, "bias on o", ""),
        ({"mlp_bias": True, "family": "llama"}, "biases in the MLP", ""),
        ({"experts": ExpertsConfig(4, 2, 24, True), "family": "qwen3_moe"}, "mixture of experts", ""),
        ({"layer_types": (LIN,) * 3}, "softmax layers", "select.budget"),
        ({"layer_types": (SOFT,) * 3}, "linear layers", "mixer.kind=gated_deltanet"),
        ({"rope": RopeConfig("dynamic", factor=2.0)}, "rotary scaling", ""),
        ({"mixer": replace(MIXER, qk_norm=True)}, "query and key norms of linear layers", "mixer.qk_norm=false"),
        ({"mixer": replace(MIXER, rope=True)}, "rotary embedding of linear layers", "mixer.rope=false"),
        ({"mixer": replace(MIXER, output_gate=False)}, "output gate of linear layers", "mixer.output_gate=true"),
        ({"mixer": replace(MIXER, expand_kv=False)}, "states of linear layers", "mixer.expand_kv=true"),
        (
            {"mixer": GLAConfig(qkv_bias=False, qk_norm=False), "layer_types": ("gla", SOFT, "gla")},
            "linear layers",
            "mixer.kind=gated_deltanet",
        ),
    ],
)
def test_what_stands_against_it_is_named(changes, feature, remedy):
    model = make_student("", **QWEN3_5)
    model = replace(model, config=replace(model.config, **changes))
    assert (feature, remedy) in [(found.name, found.remedy) for found in features(model.config) if not found.fits]
    form = choose(model, "float32", "auto")
    assert form.native is None
    assert feature in form.told
    assert remedy in form.told
    with pytest.raises(ConfigError, match=f"(?s)'native' is not possible.*{feature}"):
        choose(model, "float32", "native")


def test_a_part_that_is_not_known_stands_against_it():
    """Settings that are added later must not be dropped in silence."""

    @dataclass(frozen=True)
    class Grown(ModelConfig):
        soft_cap: float = 0.0

    config = make_student("", **QWEN3_5).config
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    assert all(feature.fits for feature in features(Grown(**values)))
    assert [feature.name for feature in features(Grown(**values, soft_cap=30.0)) if not feature.fits] == ["soft_cap"]


def test_the_interval_of_a_pattern():
    def of(*softmax, depth=8):
        types = tuple(SOFT if i in softmax else LIN for i in range(depth))
        return attention_interval(replace(make_student("", **QWEN3_5).config, num_layers=depth, layer_types=types))

    assert of(3, 7) == 4
    assert of(2, 5) == 3
    assert of(1, 3, 5, 7) == 2
    assert of(3) is None
    assert of(0, 4) is None


# --- nothing is rounded


def test_every_scale_of_16_bits_is_made_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[bits & 0x7F80 != 0x7F80].view(ml_dtypes.bfloat16)  # neither infinite nor not a number
    wide = bits.astype(np.float64)
    scales = bits[(np.abs(wide) < 1e3) & ((np.abs(wide) > 2e-9) | (wide == 0))]
    factor = _factor(scales)
    scaled = scales * factor.astype(scales.dtype)
    assert (scaled.astype(np.float64) == scales.astype(np.float64) * factor).all()
    stored = (scaled.astype(np.float32) - 1).astype(ml_dtypes.bfloat16)
    assert (stored.astype(np.float32) + 1 == scaled.astype(np.float32)).all()
    assert (np.log2(np.abs(factor)) % 1 == 0).all()
    needed = (scales.astype(np.float32) - 1).astype(ml_dtypes.bfloat16).astype(np.float32) + 1 != scales
    assert (factor != 1).sum() == needed.sum() > 1000


def test_pairs_share_a_factor_where_there_is_one():
    rng = np.random.default_rng(0)
    query, key = (rng.uniform(-2, 2, 256).astype(ml_dtypes.bfloat16) for _ in range(2))
    factor = _pair_factor(query, key)
    assert (factor[:128] == factor[128:]).all()
    powers = [sign * 2.0**power for power in range(-30, 31) for sign in (1, -1)]

    def exact(pair, by):
        channels = [pair, pair + 128]
        q, k = (x[channels] * x.dtype.type(f) for x, f in ((query, by), (key, 1 / by)))
        return _is_exact(q).all() and _is_exact(k).all()

    for pair in range(128):
        assert exact(pair, factor[pair]) == any(exact(pair, by) for by in powers), pair
    assert {exact(pair, factor[pair]) for pair in range(128)} == {True, False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_exports_compute_the_same_bits(tmp_path, teacher_folder, dtype):
    """Scales of all sizes and signs; those of queries and keys are such that there is a factor for them."""
    student = make_student(teacher_folder, least_scale=0.5, **QWEN3_5)
    rng = np.random.default_rng(1)
    student = with_scales(student, lambda shape: rng.choice([-1, 1], shape) * rng.lognormal(-1, 1.5, shape))
    attention = student.params["mixers"][SOFT]
    attention["q_norm"]["scale"], attention["k_norm"]["scale"] = jnp.full((1, 16), 0.1), jnp.full((1, 16), 27.0)

    plain = load_student(export(student, tmp_path / "plain", dtype=dtype, format="remote-code"))
    native = load_student(export(student, tmp_path / "native", dtype=dtype, told=lambda text: None))
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == "qwen3_5_text"
    assert native.config == plain.config == student.config
    changed = [x for x, y in zip(jax.tree.leaves(native.params), jax.tree.leaves(plain.params)) if (x != y).any()]
    assert len(changed) > 10
    assert np.array_equal(logits(native), logits(plain))


def test_what_has_to_be_rounded_is_told(tmp_path, teacher_folder):
    student = make_student(teacher_folder, least_scale=0.5, **QWEN3_5 | {"tie_embeddings": True})
    student.params["final_norm"]["scale"] = student.params["final_norm"]["scale"].at[3].set(0.2)
    told = []
    target = export(student, tmp_path / "auto", told=told.append)
    assert "bfloat16 cannot for 1 channels of 1 norms, model.norm.weight first: a scale changes by up to" in told[0]
    assert json.loads((target / "config.json").read_text())["model_type"] == "jaxhybrid"
    target = export(student, tmp_path / "asked", format="native", told=told.append)
    assert "bfloat16 cannot" in told[1]
    rounded = float(load_student(target).params["final_norm"]["scale"][3])
    assert 0 < abs(rounded / float(jnp.bfloat16(0.2)) - 1) < 0.02


def test_error_in_16_bits(tmp_path, teacher_folder):
    """RMS difference of bfloat16 to float32 logits, of weights that are the same in both: no more than with the model's
    own code, which keeps gates in float32, and near a softmax model's of the same shape."""
    student = make_student(teacher_folder, least_scale=0.5, **QWEN3_5)
    softmax = make_student(teacher_folder, least_scale=0.5, **QWEN3_5 | {"layer_types": (SOFT,) * 3, "mixer": None})
    native, own_code, teacher = errors_in_16_bits(tmp_path, student, softmax)
    assert 0.001 < native < 1.1 * own_code
    assert native < 1.5 * teacher


# --- the way back


@pytest.mark.parametrize("case", QWEN3_5_CASES)
def test_it_is_read_back_exactly(tmp_path, teacher_folder, case):
    student = make_student(teacher_folder, least_scale=0.5, **QWEN3_5_CASES[case])
    again = load_student(export(student, tmp_path / "native", dtype="float32", max_shard_bytes=50_000))
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)


def test_what_transformers_saved_is_read_too(native, tmp_path):
    AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path / "saved")
    jax.tree.map(
        np.testing.assert_array_equal, load_student(tmp_path / "saved").params, load_student(native).params
    )  # fmt: skip


def test_an_earlier_export_of_either_form_is_replaced(native, teacher_folder):
    student = make_student(teacher_folder, least_scale=0.5, **QWEN3_5)
    export(student, native, format="remote-code")
    assert (native / "modeling_jaxhybrid.py").exists()
    export(student, native)
    assert not list(native.glob("*.py"))


def test_changes_made_elsewhere_are_refused(native):
    file = native / "model.safetensors"
    tensors, config = load_file(file), json.loads((native / "config.json").read_text())

    gate = "model.layers.1.self_attn.q_proj.weight"
    save_file(tensors | {gate: tensors[gate] + 1}, file)
    with pytest.raises(WeightsError, match=rf"{gate} in .* has gates that are not zero"):
        load_student(native)
    save_file({name: value for name, value in tensors.items() if not name.endswith("in_proj_z.weight")}, file)
    with pytest.raises(WeightsError, match=r"lacks model\.layers\.0\.linear_attn\.in_proj_z\.weight"):
        load_student(native)
    save_file(tensors, file)

    def write(**changes):
        (native / "config.json").write_text(json.dumps(config | changes))

    write(linear_num_value_heads=8)
    with pytest.raises(ConfigError, match="linear_num_value_heads=8; the other keys say 4"):
        load_student(native)
    write(gated_deltanet=config["gated_deltanet"] | {"conv_size": 0})
    with pytest.raises(WeightsError, match=r"is a convolution, but config\.json says conv_size=0"):
        load_student(native)
    del config["base_model_type"]
    write()
    with pytest.raises(ConfigError, match="base_model_type"):
        load_student(native)
