"""What the documentation says to type: Python blocks run, commands are ones, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from jaxhybrid.cli import app
from jaxhybrid.settings.read import load_config
from tests.tiny import write_teacher

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tpu" / "README.md"]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPE = ROOT / "configs" / "llama-3.2-3b-instruct.yaml"
MODULES = ROOT / "docs" / "modules.md"
COMMAND = {  # a line of a bash block or a span of code; an indented line in the head of a recipe
    ".md": re.compile(r"^(jaxhybrid (?:[a-z]+ \S|--help).*)$|`(jaxhybrid [^`]+)`", re.MULTILINE),
    ".yaml": re.compile(r"^#  .*?(jaxhybrid .*)()$", re.MULTILINE),
}
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def commands():
    return [
        (path.relative_to(ROOT), line or span)
        for path in (*PAGES, *CONFIGS)
        for line, span in COMMAND[path.suffix].findall(path.read_text())
    ]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_python(code, folder, written, meant):
    """Runs a block of a page in `folder` with one of its names replaced; what it printed."""
    assert code.count(written) == 1
    caches = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", code.replace(written, meant)],
        cwd=folder,
        env=os.environ | caches,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_python_blocks_run_one_after_the_other(tmp_path):
    convert, load = blocks(PAGES[0])
    printed = run_python(convert, tmp_path, "demo:smollm2-135m", str(write_teacher(tmp_path / "teacher")))
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines()]
    assert len(losses) == 10
    assert all(0 < loss < 10 for loss in losses)
    text = run_python(load, tmp_path, "runs/my-model/export", "aligned-hybrid")
    assert text.startswith("The capital of France is")


def test_the_python_blocks_about_modules_run_but_for_those_with_tunix(tmp_path, monkeypatch, capsys):
    page = blocks(MODULES)
    before = [block.startswith("from tunix.") for block in page].index(True)
    assert before == 5
    code = "".join(page[:before])
    assert code.count("demo:smollm2-135m") == 1
    monkeypatch.chdir(tmp_path)
    exec(code.replace("demo:smollm2-135m", str(write_teacher(tmp_path / "teacher", 2))), {})
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^loss (.*)$", printed, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.01
    ((gap, largest),) = re.findall(r"^gap (.*) of (.*)$", printed, re.MULTILINE)
    assert float(gap) < 1e-5 * float(largest)
    ((plain, small, kl),) = re.findall(r"^bytes (.*) -> (.*), KL (.*)$", printed, re.MULTILINE)
    assert int(small) < 0.7 * int(plain)
    assert 0 < float(kl) < 0.01
    assert "up_proj" in printed
    assert "treescope" in (tmp_path / "layer.html").read_text()
    assert (tmp_path / "fine-tuned-hybrid" / "model.safetensors").exists()


def test_commands_are_found():
    assert {path.as_posix() for path, _ in commands()} >= {"README.md", "tpu/README.md", "configs/demo.yaml"}


@pytest.mark.parametrize(("path", "line"), commands(), ids=lambda value: str(value))
def test_a_command_of_the_documentation_is_one(path, line):
    verb, *arguments = shlex.split(line, comments=True)[1:]
    if verb == "--help":
        return
    command = typer.main.get_command(app).commands[verb]
    with command.make_context(verb, list(arguments)) as context:  # refuses unknown options
        config = context.params.get("config")
        if config is not None:
            known = ROOT / config if str(config).startswith("configs/") else RECIPE
            load_config(known, context.params["overrides"] or [])


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama-3.2-3b-instruct", 7),
        ("qwen2.5-1.5b-instruct", 7),
        ("qwen2.5-3b-instruct", 9),
        ("qwen2.5-7b-instruct", 7),
    ],
)
def test_the_published_layers_in_the_head_of_a_recipe_are_settings(name, kept):
    path = ROOT / "configs" / f"{name}.yaml"
    (line,) = re.findall(r"^#\s+(select\.method=explicit .*)$", path.read_text(), re.MULTILINE)
    select = load_config(path, shlex.split(line)).select
    assert select.budget == len(select.layers) == kept


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), target
