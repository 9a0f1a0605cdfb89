"""The report on how far the forms of a model differ."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxhybrid.cli import app
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate import parity as module
from jaxhybrid.evaluate.parity import CHUNKED, RECURRENT, TRANSFORMERS, parity, rows_of
from jaxhybrid.export.folder import export
from jaxhybrid.weights.huggingface import load_student
from tests.export.students import LIN, QWEN3_5, SOFT, make_student

SMALL = QWEN3_5 | {"num_layers": 2, "layer_types": (LIN, SOFT)}
TOKENS = np.random.default_rng(0).integers(1, 61, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    with pytest.warns(UserWarning, match="No tokenizer"):
        folder = export(
            make_student("", least_scale=0.5, **SMALL), tmp_path_factory.mktemp("parity") / "native", dtype="float32"
        )
    return load_student(folder)


@pytest.mark.slow
def test_forms_of_one_model_agree_in_float32(native):
    found = parity(native, TOKENS)
    assert list(found["forms"]) == [CHUNKED, RECURRENT, TRANSFORMERS]
    assert found["forms"][CHUNKED]["largest_difference"] == 0
    for name in (RECURRENT, TRANSFORMERS):
        assert 0 < found["forms"][name]["mean_difference"] <= found["forms"][name]["largest_difference"] < 1e-4, name
    assert all(figures["by_batch"] < 1e-4 for figures in found["forms"].values())
    assert found["left_out"] == {}
    assert 1 < found["reference_nats_per_token"] < 10


@pytest.mark.slow
def test_in_16_bits_they_differ_more(native):
    found = parity(native, TOKENS, "bfloat16")
    assert all(figures["mean_difference"] > 1e-3 for figures in found["forms"].values())
    with pytest.raises(ConfigError, match="dtype=int8"):
        parity(native, TOKENS, "int8")


@pytest.mark.slow
def test_what_differs_is_found(native, monkeypatch):
    """A form with another weight; one whose first row is moved by the row beside it."""
    scale = native.params["final_norm"]["scale"]
    other = native.params | {"final_norm": {"scale": scale * jnp.float32(1.01)}}
    whole = module._recurrent

    def leaking(model, dtype):
        form = whole(module.Model(other, model.config), dtype)
        return lambda tokens: form(tokens) + (len(tokens) > 1) * 0.25

    monkeypatch.setattr(module, "_recurrent", leaking)
    figures = parity(native, TOKENS)["forms"][RECURRENT]
    assert figures["by_batch"] == pytest.approx(0.25, abs=1e-3)
    assert figures["mean_difference"] > 0.2


@pytest.mark.slow
def test_python_files_are_run_only_when_asked(tmp_path):
    with pytest.warns(UserWarning, match="No tokenizer"):
        folder = export(make_student("", **SMALL), tmp_path / "own", dtype="float32", format="remote-code")
    model = load_student(folder)
    left = parity(model, TOKENS)
    assert list(left["forms"]) == [CHUNKED, RECURRENT]
    assert "--trust-remote-code" in left["left_out"][TRANSFORMERS]
    assert parity(model, TOKENS, trust_remote_code=True)["forms"][TRANSFORMERS]["largest_difference"] < 1e-4


def test_without_torch_it_says_so(native, monkeypatch):
    assert module._why_not_transformers(native, trusted=False) == ""
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    assert "torch is not installed" in module._why_not_transformers(native, trusted=True)


def test_rows_of_a_text():
    assert rows_of([[1, 2, 3], [4, 5, 6]], 2, 2).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="has 3 tokens; 2 rows of 2 need 4"):
        rows_of([[1, 2, 3]], 2, 2)
    with pytest.raises(ConfigError, match="rows=1"):
        rows_of([[1, 2, 3]], 1, 2)


@pytest.mark.slow
def test_the_command(teacher_folder, tmp_path):
    folder = export(make_student(teacher_folder, least_scale=0.5, **SMALL), tmp_path / "native")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 60 + 1}" for i in range(40)))
    command = ["parity", str(folder), "--text", str(tmp_path / "text.txt"), "--rows", "2", "--length", "10"]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    for name in (CHUNKED, RECURRENT, TRANSFORMERS, "by batch"):
        assert name in printed.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (found["rows"], found["tokens"]) == (2, 10)
