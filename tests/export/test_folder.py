"""Exported folders: what a process without jax makes of them, and what they leave on disk."""

import errno
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.export import folder as export_folder
from jaxhybrid.export.folder import export
from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET, GatedDeltaNetConfig, ModelConfig, RopeConfig
from jaxhybrid.model.params import is_spec
from jaxhybrid.model.transformer import Model, declare, forward
from jaxhybrid.weights.huggingface import load_student

SOFT, LIN = FULL_ATTENTION, GATED_DELTANET
HYBRID = (LIN, SOFT, LIN)
PLAIN = GatedDeltaNetConfig(qkv_bias=False, qk_norm=False)
FULL = GatedDeltaNetConfig(expand_kv=False, conv_size=4, rope=True, qkv_bias=True, qk_norm=True)
LLAMA3 = RopeConfig("llama3", 500.0, factor=8.0, original_max_position_embeddings=32)
YARN = RopeConfig("yarn", 500.0, factor=4.0, original_max_position_embeddings=16)
LENGTH, PADDING = 90, 13

CASES = {
    "llama_paper": {"rope": LLAMA3, "gated_deltanet": PLAIN},
    "llama_everything": {
        "tie_embeddings": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "gated_deltanet": GatedDeltaNetConfig(expand_kv=False, conv_size=4, rope=True, qkv_bias=True, qk_norm=False),
    },
    "qwen2": {
        "family": "qwen2",
        "qkv_bias": True,
        "rope": YARN,
        "gated_deltanet": GatedDeltaNetConfig(output_gate=False, conv_size=2, qkv_bias=True, qk_norm=False),
    },
    "qwen2_bias_left": {"family": "qwen2", "qkv_bias": True, "gated_deltanet": PLAIN, "tie_embeddings": True},
    "qwen3": {
        "family": "qwen3",
        "qk_norm": True,
        "rope": RopeConfig("linear", 500.0, factor=2.0),
        "gated_deltanet": GatedDeltaNetConfig(expand_kv=False, conv_size=4, qkv_bias=False, qk_norm=True),
    },
    "qwen3_everything": {
        "family": "qwen3",
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "rope": RopeConfig("dynamic", 500.0, factor=4.0),
        "gated_deltanet": FULL,
        "head_dim": 16,  # heads wider than hidden_size / num_heads
    },
    "all_softmax": {"layer_types": (SOFT,) * 3, "gated_deltanet": None},
    "all_linear": {"layer_types": (LIN,) * 3, "gated_deltanet": PLAIN},
}


def make_student(folder, **changes):
    settings = {
        "family": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "norm_eps": 1e-4,  # a smaller one magnifies float32 rounding where a linear layer's output is small
        "max_position_embeddings": 64,
        "layer_types": HYBRID,
        "gated_deltanet": PLAIN,
    }
    config = ModelConfig(**settings | changes)
    rng = np.random.default_rng(0)

    def draw(path, spec):
        name, noise = path[-1].key, rng.standard_normal(spec.shape)
        if name in ("A_log", "dt_bias"):
            values = noise
        elif name.endswith("norm"):
            values = 1 + 0.3 * noise
        else:  # projections, taps, biases: large enough that none of them is without effect
            values = 0.2 * noise
        return jnp.asarray(values, jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, declare(config), is_leaf=is_spec)
    return Model(params, config, str(folder))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """What surrounds a teacher's weights: config, tokenizer, generation config, licence."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hub") / "models--acme--tiny-1M" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, 61)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.7, "do_sample": true}')
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 0, "bos_token_id": 1}')
    (folder / "LICENSE").write_text("Do good.\n")
    (folder / "pytorch_model.bin").write_text("not to be copied")
    return folder


def isolated(tmp_path):
    """The environment of a user's process: own caches, no hub, and this repository not on the path."""
    caches = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | caches | {"HF_HUB_OFFLINE": "1"}


def run_isolated(arguments, tmp_path):
    result = subprocess.run(
        [sys.executable, *arguments],
        env=isolated(tmp_path),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="session")
def read_back(tmp_path_factory, teacher_folder):
    """Per case: our logits, and what the reader process got from the exported folder."""
    place = tmp_path_factory.mktemp("exports")
    expected = {}
    for name, changes in CASES.items():
        student = make_student(teacher_folder, **changes)
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 61, (2, LENGTH)).astype(np.int32)
        mask = np.ones_like(tokens)
        mask[1, :PADDING] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all_linear warns; its own test looks
            export(student, place / name / "model", dtype="float32")
        np.savez(place / name / "inputs.npz", tokens=tokens, mask=mask)
        run = jax.jit(lambda params, tokens, mask, config=student.config: forward(params, config, tokens, mask))
        expected[name] = {
            "logits": run(student.params, tokens, np.ones_like(tokens)),
            "padded": run(student.params, tokens, mask),
            "mask": mask,
        }
    reader = Path(__file__).with_name("reader.py")
    run_isolated([str(reader), *(str(place / name / "model") for name in CASES)], place)
    return {name: (expected[name], np.load(place / name / "outputs.npz")) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_ours(read_back, case, record_property):
    ours, theirs = read_back[case]
    difference = np.abs(theirs["logits"] - ours["logits"]).max()
    padded = (np.abs(theirs["padded"] - ours["padded"]) * ours["mask"][..., None]).max()
    record_property("max_difference", float(max(difference, padded)))
    print(f"{case}: {difference:.1e} plain, {padded:.1e} left-padded, logits std {np.std(ours['logits']):.2f}")
    assert np.std(ours["logits"]) > 0.3  # else equal would mean little
    assert difference < 1e-4
    assert padded < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_loads_whole_and_only_with_trust(read_back, case):
    _, theirs = read_back[case]
    assert str(theirs["loading"]) == "{}"
    assert "trust_remote_code=True" in str(theirs["refusal"])
    assert str(theirs["dtype"]) == "torch.float32"
    assert np.array_equal(theirs["generated"], theirs["uncached"])
    assert theirs["generated"].shape == (1, 15)


def test_what_is_in_the_folder(tmp_path, teacher_folder):
    target = export(make_student(teacher_folder), tmp_path / "student")
    assert sorted(p.name for p in target.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "configuration_jaxhybrid.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_jaxhybrid.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((target / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]
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
            assert kind == ("F32" if name.endswith(("A_log", "dt_bias")) else "BF16"), name


def test_tokenizer_works_from_the_folder(tmp_path, teacher_folder):
    target = export(make_student(teacher_folder), tmp_path / "student")
    card = (target / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("tokenizer ="))  # as the card tells users to
    code = (
        f"from transformers import AutoTokenizer; folder = {str(target)!r}; {line}; print(tokenizer('w3 w5').input_ids)"
    )
    assert run_isolated(["-c", code], tmp_path).strip() == "[3, 5]"


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


def test_all_linear_is_said(tmp_path, teacher_folder):
    with pytest.warns(UserWarning, match="no softmax layer"):
        target = export(make_student(teacher_folder, **CASES["all_linear"]), tmp_path / "student")
    assert json.loads((target / "generation_config.json").read_text())["use_cache"] is False
    assert json.loads((target / "config.json").read_text())["use_cache"] is False


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

    def full(params, config, folder, *options):
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
        ({"gated_deltanet": GatedDeltaNetConfig()}, "float32", "unset"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, changes, dtype, message):
    config = make_student("").config
    with pytest.raises(ConfigError, match=message):
        export(Model({}, replace(config, **changes)), tmp_path / "student", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The exported model has no softmax layer")
def test_student_is_read_back_exactly(tmp_path, teacher_folder, case):
    student = make_student(teacher_folder, **CASES[case])
    again = load_student(export(student, tmp_path / "whole", dtype="float32"))
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)

    half = load_student(export(student, tmp_path / "half", dtype="bfloat16"))

    def rounded(spec, found, expected):
        expected = expected if spec.float32 else expected.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(found, expected)

    jax.tree.map(rounded, declare(student.config), half.params, student.params, is_leaf=is_spec)
