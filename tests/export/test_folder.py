"""What an export leaves on disk, what it refuses, and that a student is read back from it."""

import errno
import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxhybrid.data.vocabulary import load_vocabulary
from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.export import folder as export_folder
from jaxhybrid.export.folder import CODE_FILES, REMOTE_CODE, export
from jaxhybrid.model.blueprint import Exact, is_variable
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import Model, model_variables
from jaxhybrid.weights.huggingface import HUB_FILES, load_student
from tests.export.students import CASES, make_student


def test_what_is_in_the_folder(tmp_path, teacher_folder):
    target = export(make_student(teacher_folder), tmp_path / "student")
    assert sorted(p.name for p in target.iterdir()) == [
        "LICENSE",
        "README.md",
        "USE_POLICY.md",
        "checksums.json",
        "config.json",
        "configuration_jaxhybrid.py",
        "decoder_layer_jaxhybrid.py",
        "delta_rule_jaxhybrid.py",
        "deltanet_jaxhybrid.py",
        "dplr_jaxhybrid.py",
        "fixed_decay_jaxhybrid.py",
        "gated_deltanet_jaxhybrid.py",
        "generation_config.json",
        "gla_jaxhybrid.py",
        "kimi_delta_jaxhybrid.py",
        "linear_attention_jaxhybrid.py",
        "mamba2_jaxhybrid.py",
        "model.safetensors",
        "modeling_jaxhybrid.py",
        "packing_jaxhybrid.py",
        "rwkv6_jaxhybrid.py",
        "rwkv7_jaxhybrid.py",
        "softmax_attention_jaxhybrid.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "window_attention_jaxhybrid.py",
    ]
    assert {p.name for p in REMOTE_CODE.glob("*.py")} == set(CODE_FILES)
    config = json.loads((target / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention"]
    assert "use_cache" not in config
    assert config["base_model"] == "acme/tiny-1M"
    assert config["base_model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert config["eos_token_id"] == 0
    card = (target / "README.md").read_text()
    assert "base_model: acme/tiny-1M\n" in card
    assert "kept in layers 1;" in card
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.7
    assert not list(tmp_path.glob(".*"))
    with safe_open(target / "model.safetensors", "np") as weights:
        for name in weights.keys():  # noqa: SIM118
            kind = weights.get_slice(name).get_dtype()
            assert kind == ("F32" if name.endswith(("A_log", "dt_bias", "a_up_proj.bias")) else "BF16"), name


def test_its_tokenizer_is_read_in_silence(tmp_path, teacher_folder, capfd):
    target = export(make_student(teacher_folder), tmp_path / "student")
    capfd.readouterr()
    vocabulary = load_vocabulary(target)
    assert vocabulary.encode(["b d"])[0].tolist() == [3, 1, 5, 0]
    assert capfd.readouterr() == ("", "")


def test_terms_of_the_base_model_are_fetched_and_kept(tmp_path, teacher_folder):
    names = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "COPYING", "ACCEPTABLE_USE.md")
    assert all(any(fnmatch(name, pattern) for pattern in HUB_FILES) for name in names)
    source = Path(shutil.copytree(teacher_folder, tmp_path / "base"))
    for name in names:
        (source / name).write_text(name)
    target = export(make_student(source), tmp_path / "student")
    assert [(target / name).read_text() for name in names] == list(names)
    export(make_student(source), target)  # they are the export's own, nothing that would be lost


def test_shards(tmp_path, teacher_folder):
    student = make_student(teacher_folder, **CASES["qwen3"])
    target = export(student, tmp_path / "student", dtype="float32", max_shard_bytes=20_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    export(student, target)  # an earlier export with its shards is replaced, and no shard stays behind
    assert [p.name for p in target.glob("model*.safetensors*")] == ["model.safetensors"]


def test_missing_tokenizer_is_named(tmp_path, teacher_folder):
    (tmp_path / "bare").mkdir()
    with pytest.warns(UserWarning, match=r"No tokenizer in .*bare; looked for tokenizer\.json"):
        export(make_student(tmp_path / "bare"), tmp_path / "student")
    with pytest.warns(UserWarning, match="no source folder"):
        export(make_student(""), tmp_path / "other")


# --- what is on the disk is not lost


def test_only_an_earlier_export_is_replaced(tmp_path, teacher_folder):
    student, target = make_student(teacher_folder), tmp_path / "student"
    target.mkdir()
    export(student, target)  # an empty folder is nobody's
    (target / "README.md").write_text("old")
    export(student, target)
    assert (target / "README.md").read_text() != "old"

    (target / "results.json").write_text("{}")
    with pytest.raises(RunError, match=r"results\.json"):
        export(student, target)
    assert (target / "results.json").exists()
    export(student, target, overwrite=True)
    assert not (target / "results.json").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not an earlier export"):
        export(student, other)
    with pytest.raises(RunError, match="is a file"):
        export(student, other / "thesis.txt", overwrite=True)
    assert (other / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RunError, match="contains the base model"):
        export(student, teacher_folder.parent, overwrite=True)
    assert (teacher_folder / "tokenizer.json").exists()


def test_export_over_the_folder_it_was_loaded_from(tmp_path, teacher_folder):
    target = export(make_student(teacher_folder), tmp_path / "student")
    export(make_student(target), target)
    assert json.loads((target / "config.json").read_text())["base_model"] == "acme/tiny-1M"
    assert (target / "tokenizer.json").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_what_was_there(tmp_path, teacher_folder, monkeypatch, existing):
    student, target = make_student(teacher_folder), tmp_path / "student"
    if existing:
        export(student, target)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))

    def full(params, config, folder, *options, **named):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_folder, "save_weights", full)
    with pytest.raises(RunError, match=r"No space left on the disk of .*student\. .*nothing is left of the export"):
        export(student, target)
    after = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    assert [b for b in before if b[0] != tmp_path] == after


def test_unwritable_place(teacher_folder):
    with pytest.raises(RunError, match=r"/proc/jaxhybrid cannot be written .*choose another folder"):
        export(make_student(teacher_folder), "/proc/jaxhybrid/student")


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({}, "int4", "int4"),
        ({"family": "gpt2"}, "float32", "gpt2"),
        ({"qk_norm": True}, "float32", "qk_norm=True"),
        ({"family": "qwen2"}, "float32", "qwen2 model cannot have qkv_bias=False"),
        ({"mixer": GatedDeltaNetConfig()}, "float32", "unset"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, changes, dtype, message):
    config = make_student("").config
    with pytest.raises(ConfigError, match=message):
        export(Model({}, replace(config, **changes)), tmp_path / "student", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_student_is_read_back_exactly(tmp_path, teacher_folder, case):
    student = make_student(teacher_folder, **CASES[case])
    again = load_student(export(student, tmp_path / "whole", dtype="float32"))
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)

    half = load_student(export(student, tmp_path / "half", dtype="bfloat16"))

    def rounded(spec, found, expected):
        expected = expected if isinstance(spec, Exact) else expected.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(found, expected)

    jax.tree.map(rounded, model_variables(student.config), half.params, student.params, is_leaf=is_variable)
