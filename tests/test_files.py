"""Drafts: what a killed process leaves is cleared up, and what others are at work on is not."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from jaxhybrid.errors import WeightsError
from jaxhybrid.files import draft_of, read_json, write_text


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "part").write_text("half")


def test_drafts_of_killed_processes_are_removed(tmp_path, dead):
    host, path = platform.node(), tmp_path / "export"
    stale = f".export.{host}-{dead}-0.tmp"
    others = [
        f".export.{host}-{os.getppid()}-0.tmp",  # still running
        f".export.not-{host}-{dead}-0.tmp",  # on another machine
        f".exports.{host}-{dead}-0.tmp",  # of something else
        f".export.{host}-{dead}-0.old",  # all there is, until there is another
    ]
    leave(tmp_path, stale, *others)
    with draft_of(path) as draft:
        assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(others)
        draft.mkdir()
        draft.rename(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["export", *others[:3]])


def test_drafts_of_a_killed_process_with_our_number_are_removed(tmp_path):
    """In a container every process may have it."""
    ours = f"{platform.node()}-{os.getpid()}"
    with draft_of(tmp_path / "export") as open_one:
        open_one.mkdir()
        leave(tmp_path, f".export.{ours}-9999999.tmp")
        with draft_of(tmp_path / "export"):
            assert [path.name for path in tmp_path.iterdir()] == [open_one.name]


def test_a_draft_is_gone_after_an_error(tmp_path):
    leave(tmp_path, "source")
    (tmp_path / "source" / "broken").symlink_to("nowhere")
    with pytest.raises(shutil.Error), draft_of(tmp_path / "copy") as draft:
        shutil.copytree(tmp_path / "source", draft)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_write_leaves_the_old_text(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")
    code = f"""
import os, signal
from pathlib import Path
from jaxhybrid.files import write_text
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path({str(path)!r}), "new")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text(path, "newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "newer"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"])
def test_what_is_not_json_is_said_in_the_callers_words(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"config\.json is not valid JSON .* Fetch it again\."):
        read_json(tmp_path / "config.json", WeightsError, "Fetch it again.")
