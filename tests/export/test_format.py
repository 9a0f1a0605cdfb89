"""Forms of exports that are not written: what is said of each, and that nothing is left."""

import sys

import pytest
from typer.testing import CliRunner

from jaxhybrid.cli import app, main
from jaxhybrid.errors import ConfigError
from jaxhybrid.export.folder import export
from jaxhybrid.settings.read import load_config
from tests.export.students import make_student

REFUSED = {
    "fla": ["'fla' is not written", "flash-attn", "query and key norms", "Take native", "plugins/vllm"],
    "gguf": ["'gguf' is not written", "convert_hf_to_gguf.py", "take native", "there is no GGUF", "remote-code"],
    "onnx": ["'onnx': choose auto, native, remote-code"],
}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"name: one\nrun_dir: {tmp_path}/run\nteacher: {tmp_path}/none\ndata: {{train: pydoc}}\n")
    return file


@pytest.mark.parametrize("asked", REFUSED)
def test_the_command_says_why_and_leaves_nothing(config, monkeypatch, capsys, asked):
    """Before the run is opened: here it has no teacher."""
    monkeypatch.setattr(sys, "argv", ["jaxhybrid", "export", str(config), "--format", asked])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith(f"error: export format {asked!r}")
    for part in REFUSED[asked]:
        assert part in printed.err
    assert printed.out == ""
    assert [*config.parent.iterdir()] == [config]


@pytest.mark.parametrize("asked", REFUSED)
def test_from_python_too(tmp_path, asked):
    with pytest.raises(ConfigError) as refused:
        export(make_student(""), tmp_path / "out", format=asked)
    for part in REFUSED[asked]:
        assert part in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_in_a_config(config):
    with pytest.raises(ConfigError, match=r"export\.format.*'gguf' is not written.*convert_hf_to_gguf"):
        load_config(config, ["export.format=gguf"])
    with pytest.raises(ConfigError, match=r"export\.format.*'onnx'"):
        load_config(config, ["export.format=onnx"])
    assert load_config(config, ["export.format=native"]).export.format == "native"


def test_help_has_them():
    told = " ".join(CliRunner().invoke(app, ["export", "--help"]).output.split())
    assert "fla and gguf are not written" in told
