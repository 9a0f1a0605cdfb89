"""`jaxhybrid inspect`: where a run is and what comes next, of whole, half-done, damaged, moved and old run folders."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxhybrid.checksums import write_manifest, write_result
from jaxhybrid.cli import app
from jaxhybrid.errors import RunError
from jaxhybrid.report.inspection import inspect_run
from jaxhybrid.selection.ranking import CandidateScore, write_score
from tests.test_report import EVALUATION, KEPT, make_run, write, write_stage

CONFIG = """
name: half
teacher: some/teacher
select: {method: kl_guided}
align: {tokens: 122880, sequence_length: 64, batch_size: 32}
score: {tokens: 1024, sequence_length: 64, batch_size: 8}
distill: {tokens: 204800, sequence_length: 64, batch_size: 32}
finetune: {tokens: 2048, sequence_length: 64, batch_size: 32}
"""


@pytest.fixture
def screen(monkeypatch):
    """What the command prints into a pipe."""

    def run(folder, *options, width="110"):
        monkeypatch.setenv("COLUMNS", width)
        result = CliRunner().invoke(app, ["inspect", str(folder), *options])
        if result.exception:
            raise result.exception
        assert "\x1b" not in result.stdout  # no colour
        return result.stdout

    return run


def half(run):
    """Aligned, two of three layers scored, distilled for 60 of 100 steps by somebody who chose the layers himself."""
    write(run / "config.yaml", CONFIG)
    write_stage(run / "align", heldout_layer_loss_before=[1.0, 2.0, 3.0], heldout_layer_loss_after=[0.1, 0.2, 0.3])
    for layer in range(2):
        score = CandidateScore(layer, [(512, 2.0), (1024, 1.5)], [(0, 2.5), (1024, 1.25)])
        write_score(run / "score" / "scores", score)
    write_stage(run / "distill")
    (run / "distill" / "checkpoints" / "40").mkdir(parents=True)
    (run / "distill" / "checkpoints" / "40" / "data").write_bytes(bytes(300_000))
    return run


def row(text, name):
    """The last line that begins with this word."""
    return [line for line in text.splitlines() if line.split()[:1] == [name]][-1]


def test_a_finished_run(screen, tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "export" / "config.json", "{}")
    write(run / "report" / "index.html", "<html>")
    text = screen(run)
    for part in ("done", "122,880", "5,030", "2.954 > 0.2494", "24 s"):
        assert part in row(text, "align")
    assert "4 min 0 s" in row(text, "score")
    assert "983,040" in row(text, "score")
    assert "3 of 12 layers softmax, by kl_guided: 3 6 10" in text
    assert "14.26" in row(text, "teacher")
    assert "1,016.50" in row(text, "finetune")
    assert row(text, "export").split()[1] == str(run / "export")
    assert row(text, "report").split()[1] == str(run / "report" / "index.html")
    assert row(text, "next").endswith(f'jaxhybrid generate {run / "export"} "The capital of France is"')


def test_a_half_done_run(screen, tmp_path):
    run = half(tmp_path / "run")
    text = screen(run)
    assert "done" in row(text, "align")
    assert "2 of 3 layers" in row(text, "score")
    assert "step 60 of 100, 40 saved" in row(text, "distill")
    assert row(text, "distill").split()[-1] == "kB"
    assert "not begun" in row(text, "finetune")
    assert "not yet" in row(text, "export")
    assert row(text, "next").endswith(f"jaxhybrid run {run}")
    found = json.loads(screen(run, "--json"))
    distill = found["stages"]["distill"]
    assert distill["state"] == "begun"
    assert (distill["step"], distill["steps"], distill["checkpoint"]) == (60, 100, 40)
    assert distill["tokens"] == 122_880
    np.testing.assert_allclose(distill["seconds"], sum(2048 / (5000 + i) for i in range(1, 61)))
    assert 300_000 <= distill["disk_bytes"] < 400_000
    assert found["stages"]["score"]["scored"] == 2
    assert found["softmax_layers"] is None


def test_a_mean_of_ranks_that_asks_for_scores_needs_them(screen, tmp_path):
    for of, state in (("single_kl, kl_guided", "not begun"), ("single_kl, removal", "not needed")):
        select = f"{{method: average_rank, average_rank: {{of: [{of}]}}}}"
        write(tmp_path / "config.yaml", f"name: mean\nselect: {select}\n")
        assert state in row(screen(tmp_path), "score")


def test_a_run_that_has_just_begun(screen, tmp_path):
    write(tmp_path / "config.yaml", "name: new\nselect: {method: kl_guided}\n")
    text = screen(tmp_path)
    assert all("not begun" in row(text, stage) for stage in ("align", "score", "distill", "finetune"))
    write(tmp_path / "config.yaml", "name: new\n")
    assert "not needed" in row(screen(tmp_path), "score")  # by the default method
    with pytest.raises(RunError, match=r"none is not a run folder: it has no config\.yaml"):
        screen(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", "a: [b"),
        ("config.yaml", "7"),
        ("align/done.json", "{"),
        ("layers.json", "[1, 2]"),
        ("evaluation.json", '{"models": 3}'),
        ("score/scores/000.json", "{"),
        ("distill/metrics.jsonl", "{\n"),
    ],
)
def test_damage_is_shown_beside_what_is_left(screen, tmp_path, file, content):
    run = half(tmp_path / "run")
    write_result(run / "layers.json", {"method": "kl_guided", "softmax_layers": KEPT})
    write_result(run / "evaluation.json", EVALUATION)
    write(run / file, content)
    text = screen(run)
    assert str(run / file) in row(text, "damaged")
    assert "step 60 of 100" in text or file in ("distill/metrics.jsonl", "config.yaml")
    assert json.loads(screen(run, "--json"))["damaged"]


def test_checksums_are_compared_when_asked(screen, tmp_path):
    run = half(tmp_path / "run")
    write(run / "align" / "params" / "data", "weights")
    for folder in (run / "align" / "params", run / "distill" / "checkpoints" / "40"):
        write_manifest(folder)
    assert "damaged" not in screen(run, "--verify")
    write(run / "align" / "params" / "data", "weight?")
    (run / "distill" / "checkpoints" / "40" / "data").unlink()
    assert "damaged" not in screen(run)
    text = screen(run, "--verify", width="200")
    assert f"{run / 'align' / 'params' / 'data'} does not match its checksum" in text
    assert f"{run / 'distill' / 'checkpoints' / '40' / 'data'} is gone" in text


def test_a_moved_run_is_shown_where_it_is_and_fits_the_terminal(screen, tmp_path):
    run = half(tmp_path / "run")
    write(run / "config.yaml", CONFIG + f"run_dir: {run}\n")
    moved = run.rename(tmp_path / "moved")
    text = screen(moved, width="60")
    assert f"jaxhybrid run {moved}" in text  # whole, to be copied
    assert max(len(line) for line in text.splitlines() if str(moved) not in line) <= 60
    assert inspect_run(moved)["path"] == str(moved)
    assert not (tmp_path / "run").exists()
