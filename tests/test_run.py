"""Whole runs from the command line: done once, again, spread over processes, partly taken over."""

import shutil

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxhybrid.weights.huggingface import load_student
from tests.runs import exported, read, records, snapshot

STAGES = ("align", "score", "distill", "finetune")


def trained(run):
    """Parameters of the finetune stage."""
    like = load_student(run / "export").params
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    return ocp.load((run / "finetune" / "params").absolute(), abstract)


def assert_same_results(run, expected):
    assert read(run / "scores.json") == read(expected / "scores.json")
    assert read(run / "layers.json") == read(expected / "layers.json")
    assert read(run / "evaluation.json") == read(expected / "evaluation.json")
    for stage in ("align", "distill", "finetune"):
        assert records(run / stage) == records(expected / stage), stage
    jax.tree.map(np.testing.assert_array_equal, trained(run), trained(expected))
    ours, theirs = exported(run), exported(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], name)


def test_a_run_leaves_every_result(whole):
    run = whole.run
    scores, layers, evaluation = (read(run / f"{name}.json") for name in ("scores", "layers", "evaluation"))
    for stage, tokens in (("align", 5120), ("distill", 5120), ("finetune", 3072)):
        done = read(run / stage / "done.json")
        assert done["tokens"] == tokens
        assert done["tokens_per_second"] > 0
        assert 10 < done["mean_segment_tokens"] < 64
    align = read(run / "align" / "done.json")
    assert align["heldout_loss_after"] < align["heldout_loss_before"]

    done = read(run / "score" / "done.json")
    assert done["compiled_programs"] == {"train_step": 1, "heldout_kl": 1, "teacher_forward": 1}
    assert done["candidate_tokens"] == 3 * 3072
    assert sorted(scores["ranking"]) == sorted(scores["ranking_by_training_kl"]) == [0, 1, 2]
    for candidate in scores["candidates"]:
        assert [tokens for tokens, _ in candidate["heldout"]] == [0, 1536, 3072]
        assert [tokens for tokens, _ in candidate["train"]] == [1536, 2048, 3072]
        assert min(kl for _, kl in candidate["heldout"] + candidate["train"]) > 0
    importance = [scores["importance"][str(layer)] for layer in scores["ranking"]]
    assert importance == sorted(importance, reverse=True)
    assert not list((run / "score").glob("candidates/*")) + list((run / "score").glob("teacher-*"))

    assert layers["softmax_layers"] == scores["ranking"][:1]
    assert layers["other_budgets"] == {"1": scores["ranking"][:1], "2": sorted(scores["ranking"][:2])}
    assert list(evaluation["models"]) == ["teacher", "distill", "finetune"]
    assert evaluation["models"]["distill"]["kl"] > 0
    assert {name: row["trained_tokens"] for name, row in evaluation["models"].items()} == {
        "teacher": 0, "distill": 5120 + 5120, "finetune": 5120 + 5120 + 3072
    }  # fmt: skip
    assert {row["hardware"] for row in evaluation["models"].values()} == {"1 x cpu"}
    assert [measured["sequence_length"] for measured in evaluation["quality"]] == [64]
    assert evaluation["tasks"] == []
    (recall,) = evaluation["recall"]
    assert (recall["pairs"], recall["filler_tokens"], recall["prompts"]) == (2, 0, 8)
    assert not recall["applies"]  # a random teacher repeats nothing
    assert list(recall["models"]) == ["teacher"]
    assert "finetune" in (whole.folder / "output.txt").read_text()
    assert (run / "report" / "index.html").stat().st_size > 10_000


def test_the_export_is_the_trained_student(whole):
    student = load_student(whole.run / "export")
    assert student.config.softmax_layers == tuple(read(whole.run / "layers.json")["softmax_layers"])
    jax.tree.map(np.testing.assert_array_equal, student.params, trained(whole.run))


def test_the_same_command_again_trains_nothing(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    before = {stage: snapshot(run / stage) for stage in STAGES}
    again = whole.start("run", whole.config, f"run_dir={run}")
    assert again.returncode == 0, again.stderr
    assert {stage: snapshot(run / stage) for stage in STAGES} == before
    assert "tok/s" not in again.stderr  # no stage's progress
    assert_same_results(run, whole.run)


def test_candidates_scored_in_two_folders_are_merged(whole, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        shutil.copytree(whole.run / "align", run / "align")
        shutil.copyfile(whole.run / "config.yaml", run / "config.yaml")
    output = whole.finish("score", first, "--candidates", "0:1")
    assert "layers [1, 2] are still to be scored" in output
    assert not (first / "score" / "done.json").exists()
    refused = whole.start("select", first)
    assert refused.returncode == 2
    assert "2 of 3 layers have no score" in refused.stderr
    whole.finish("score", second, "score.keep_teacher_states=false", "--candidates", "1:3")
    whole.finish("score", first, "--merge", second)
    assert read(first / "scores.json") == read(whole.run / "scores.json")
    assert (first / "score" / "done.json").exists()


def test_another_choice_of_layers_takes_over_what_is_done(whole, tmp_path):
    run = tmp_path / "uniform"
    before = [snapshot(whole.run / stage) for stage in STAGES]
    done = whole.start("run", whole.config, f"run_dir={run}", "select.method=uniform", "--reuse", whole.run)
    assert done.returncode == 0, done.stderr
    assert f"reuse: align taken from {whole.run}" in done.stdout
    assert done.stdout.count("text: documents begin with no special token and end with <end>\n") == 1
    assert f"reuse: score taken from {whole.run}" in done.stdout
    assert "align:" not in done.stderr
    assert "distill:" in done.stderr
    assert read(run / "layers.json")["softmax_layers"] == [2]
    assert (run / "export" / "model.safetensors").exists()
    assert [snapshot(whole.run / stage) for stage in STAGES] == before
