"""Exports of sliding windows in their teacher's own architecture: what it can express, its values, the way back.

That transformers computes what we do, in the oldest version that it is for and the newest, is in test_reading.py.
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from jaxhybrid.errors import ConfigError
from jaxhybrid.export.folder import export
from jaxhybrid.export.form import choose, why_not_native
from jaxhybrid.families.native_windows import features
from jaxhybrid.model.config import RopeConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.huggingface import load_student, load_teacher
from tests.export.rounding import logits, read
from tests.export.students import SOFT, WINDOW_CASES, WINDOWS, make_student

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:No tokenizer")
MINISTRAL, OLMO3 = WINDOW_CASES["windows_ministral"], WINDOW_CASES["windows_olmo3"]


@pytest.fixture
def native(tmp_path):
    return export(make_student("", **WINDOWS), tmp_path / "native", dtype="float32")


# --- what it can express


@pytest.mark.parametrize(
    ("settings", "changes", "feature", "remedy"),
    [
        (WINDOWS, {"mixer": WindowAttentionConfig(8, sinks=2)}, "attention sinks", "mixer.sinks=0"),
        (WINDOWS, {"family": "llama"}, "windows in single layers", ""),
        (WINDOWS, {"family": "mistral"}, "windows in single layers", ""),
        (WINDOWS, {"layer_types": (SOFT,) * 3}, "linear layers", "mixer.kind=window_attention"),
        (WINDOWS, {"mixer": WindowAttentionConfig(64)}, "window of converted layers", ""),
        (MINISTRAL, {"mixer": WindowAttentionConfig(9)}, "windows of all layers that slide", "mixer.window=8"),
        (OLMO3, {"layer_types": ("window_attention",) * 3}, "converted layers with the rotary base of full ones", ""),
        (WINDOWS, {"softmax": SoftmaxConfig(rope=False)}, "rotary embedding of softmax layers", "softmax.rope=true"),
        (
            WINDOWS,
            {"softmax": SoftmaxConfig(length_scale=64.0)},
            "queries scaled by length",
            "softmax.length_scale=null",
        ),
        (WINDOWS, {"rope": RopeConfig("dynamic", factor=2.0)}, "rotary scaling", ""),
    ],
)
def test_what_stands_against_it_is_named(settings, changes, feature, remedy):
    model = make_student("", **settings)
    assert all(found.fits for found in features(model.config))
    model = replace(model, config=replace(model.config, **changes))
    assert [(found.name, found.remedy) for found in features(model.config) if not found.fits] == [(feature, remedy)]
    form = choose(model, "float32", "auto")
    assert form.native is None
    assert form.told.startswith(f"transformers' own {model.config.family} cannot express:")
    assert feature in form.told
    assert remedy in form.told
    with pytest.raises(ConfigError, match=f"(?s)'native' is not possible.*{feature}"):
        choose(model, "float32", "native")


def test_of_other_mixers_the_teachers_own_architecture_is_not_told():
    assert "own llama " not in why_not_native(make_student("").config)


# --- nothing changes


def test_logits_of_its_own_class(tmp_path):
    """Equal to ours; and the windows act: without them the logits are far from these."""
    student = make_student("", **WINDOWS)
    model, theirs = read(export(student, tmp_path / "native", dtype="float32"), torch.float32)
    exact = logits(student)
    assert type(model) is Qwen2ForCausalLM
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [8, None, 8]
    assert np.abs(theirs - exact).max() < 1e-4
    wide = replace(student.config, mixer=WindowAttentionConfig(63))
    assert np.abs(logits(Model(student.params, wide)) - exact).max() > 0.3


def test_exports_in_16_bits_compute_the_same_bits(tmp_path):
    student = make_student("", **WINDOWS)
    plain = load_student(export(student, tmp_path / "plain", format="remote-code"))
    native = load_student(export(student, tmp_path / "native"))
    assert not list((tmp_path / "native").glob("*.py"))
    jax.tree.map(np.testing.assert_array_equal, native.params, plain.params)


def test_it_is_said_that_a_server_may_heed_no_windows(tmp_path):
    told = []
    native = export(make_student("", **WINDOWS), tmp_path / "native", told=told.append)
    assert "heeds no sliding window in single layers" in told[0]
    assert "heeds no sliding window in single layers" in (native / "README.md").read_text()


def test_a_server_that_reads_no_list_of_layers_is_told_that_some_slide(native):
    """vLLM refuses a Qwen2 with `max_window_layers` below the depth, and takes all layers for full ones with others."""
    assert json.loads((native / "config.json").read_text())["max_window_layers"] == 0


# --- the way back


@pytest.mark.parametrize("case", WINDOW_CASES)
def test_it_is_read_back_exactly(tmp_path, case):
    student = make_student("", **WINDOW_CASES[case])
    again = load_student(export(student, tmp_path / "native", dtype="float32", max_shard_bytes=50_000))
    assert json.loads((tmp_path / "native" / "config.json").read_text())["model_type"] == student.config.family
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)


@pytest.mark.parametrize("case", WINDOW_CASES)
def test_what_transformers_saved_is_read_too(tmp_path, case):
    student = make_student("", **WINDOW_CASES[case])
    native = export(student, tmp_path / "native", dtype="float32")
    AutoModelForCausalLM.from_pretrained(native).save_pretrained(tmp_path / "saved")
    again = load_student(tmp_path / "saved")
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)


def test_it_is_a_student_and_its_teacher_is_not(native, tmp_path):
    with pytest.raises(ConfigError, match="model_type='qwen2' is an exported student"):
        load_teacher(native)
    config = json.loads((native / "config.json").read_text())
    del config["base_model_type"], config["jaxhybrid"]
    (native / "config.json").write_text(json.dumps(config))
    assert load_teacher(native).config.window == WindowConfig(8, (0, 2))
    with pytest.raises(ConfigError, match=r"model_type='qwen2' is not a student .* load_teacher"):
        load_student(native)


def test_changes_made_elsewhere_are_refused(native):
    config = json.loads((native / "config.json").read_text())

    def write(**changes):
        (native / "config.json").write_text(json.dumps(config | changes))

    write(sliding_window=16)
    with pytest.raises(ConfigError, match=r"window=WindowConfig\(size=16.*WindowConfig\(size=8.* under jaxhybrid"):
        load_student(native)
    write(layer_types=["sliding_attention", "full_attention", "full_attention"])
    with pytest.raises(ConfigError, match=r"layers=\(0,\).*layers=\(0, 2\).* under jaxhybrid"):
        load_student(native)
    write(jaxhybrid=config["jaxhybrid"] | {"window_attention": {"window": 8, "sinks": 2, "depth": 1}})
    with pytest.raises(ConfigError, match="window_attention has depth"):
        load_student(native)
    write(jaxhybrid=None)
    with pytest.raises(ConfigError, match="base_model_type, and jaxhybrid=None"):
        load_student(native)
    write(soft_cap=1.0)
    with pytest.raises(ConfigError, match=r"soft_cap=1\.0, which is not known"):
        load_student(native)
