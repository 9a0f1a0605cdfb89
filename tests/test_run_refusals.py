"""What a run refuses, each with one message that says what is wrong and what to do, and storage that gives out."""

import errno
import io
import json
import os
import resource
import shutil
import sys
import warnings
from contextlib import closing, contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxhybrid.cli import main, read_settings
from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.export.folder import export
from jaxhybrid.files import storage_errors, write_json
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.report import write_report
from jaxhybrid.run_folder import RunFolder
from jaxhybrid.selection.ranking import CandidateScore, write_score
from jaxhybrid.selection.teacher_cache import TeacherCache
from jaxhybrid.settings.read import load_config
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.metrics import Recorder, read_metrics
from jaxhybrid.weights.huggingface import load_teacher
from tests.runs import Workshop, snapshot

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    workshop.prepare()
    return workshop


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs the command line; it must exit with 2 and say each of `parts` in a short message."""

    def run(*arguments, parts):
        monkeypatch.setattr(sys, "argv", ["jaxhybrid", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        message = printed[printed.index("error: ") :]
        assert "Traceback" not in printed
        assert len(message.splitlines()) < 25, message
        for part in parts:
            assert part in message
        return message

    return run


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["distill.tokns=3"], ["'distill.tokns'", "Did you mean 'distill.tokens'?"]),
        (["align.tokns=3", "seed=x"], ["'align.tokns'", "seed is 'x'"]),
        (["mesh.tensor=3"], ["devices do not divide", "tensor=3"]),
        (["distill.batch_size=12"], ["distill: batch_size=12 does not divide", "8 devices"]),
        (
            ["select.method=greedy_kl", "select.measure={{tokens: 96, sequence_length: 16, batch_size: 6}}"],
            ["select.measure: batch_size=6 does not divide", "8 devices"],
        ),
        (["select.budget=4"], ["select.budget 4", "the model has 3", "at most 3"]),
        (["score.budgets=[0.1]"], ["score.budgets 0.1", "at least 1"]),
        (["select.method=explicit", "select.layers=[1, 3]", "select.budget=2"], ["select.layers names [3]", "0 to 2"]),
        (["align.sequence_length=129"], ["align.sequence_length 129", "128 tokens"]),
        (["data.train=[{folder}/empty.txt]"], ["empty.txt", "holds no text"]),
        (["data.train={folder}/none.txt"], ["none.txt", "No file matches"]),
        (["data.heldout_tokens=9_000_000"], ["9,000,000"]),
        (["teacher={folder}/none"], ["none", "neither a folder nor a hub id"]),
        (["run_dir={folder}/empty.txt/run"], ["empty.txt/run", "a file stands where a folder is needed"]),
    ],
    ids=lambda value: value[0].partition("{")[0] if "=" in value[0] else "",
)
def test_settings(workshop, refused, tmp_path, overrides, parts):
    (workshop.folder / "empty.txt").write_text("")
    overrides = [override.format(folder=workshop.folder) for override in overrides]
    refused("run", workshop.config, f"run_dir={tmp_path / 'run'}", *overrides, parts=parts)
    assert not (tmp_path / "run" / "align").exists()
    if not overrides[0].startswith("run_dir="):  # the corrected command is not refused for the folder it left
        config = load_config(workshop.config, [f"run_dir={tmp_path / 'run'}"])
        assert RunFolder.open(config).path == tmp_path / "run"


def test_what_is_done_need_not_divide_over_other_devices(workshop, refused, tmp_path, monkeypatch):
    """A run whose layers are chosen goes on where their measure's batches would not divide."""

    def reached(self):
        raise ConfigError("align is reached")

    monkeypatch.setattr(Pipeline, "align", reached)
    measure = "select.measure={tokens: 96, sequence_length: 16, batch_size: 6}"
    arguments = "run", workshop.config, f"run_dir={tmp_path / 'run'}", "select.method=greedy_kl", measure
    refused(*arguments, parts=["select.measure: batch_size=6 does not divide"])
    (tmp_path / "run" / "layers.json").write_text("{}")
    refused(*arguments, parts=["align is reached"])


def test_too_little_disk_is_said_before_anything_is_trained(workshop, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhybrid.disk.free_bytes", lambda path: 400_000)
    arguments = workshop.config, f"run_dir={tmp_path / 'run'}", "score.stop_when_stable={window: 2}"
    parts = ["400 kB are free at", "choose another run_dir"]
    refused("run", *arguments, parts=["the run, most of it at", *parts])
    refused("align", *arguments, parts=["align takes up to", "3 checkpoints", "align.checkpoint_every=10", *parts])
    refused("score", *arguments, parts=["3 waiting candidates: score.kept_dtype=bfloat16", *parts])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "versions.json"]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size // 2)


def lose_shard(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = change(tensors[name])
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: edit_config(folder, model_type="mamba"), ["mamba", "llama"]),
        (truncate, [WEIGHTS, "truncated", "fetch it again"]),
        (lose_shard, ["model-00001-of-00002.safetensors", "fetch it again"]),
        (lambda folder: edit_weights(folder, lambda x: None), ["model.layers.1.mlp.up_proj.weight", "lacks"]),
        (lambda folder: edit_weights(folder, lambda x: x[:-1].copy()), ["up_proj", "[47, 32]", "[48, 32]"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "not a Hugging Face model folder"]),
    ],
    ids=["unknown family", "truncated", "lost shard", "lost tensor", "wrong shape", "no config"],
)
def test_damaged_teachers(workshop, refused, tmp_path, damage, parts):
    teacher = tmp_path / "teacher"
    shutil.copytree(workshop.folder / "teacher", teacher)
    damage(teacher)
    refused("run", workshop.config, f"run_dir={tmp_path / 'run'}", f"teacher={teacher}", parts=parts)


@pytest.fixture
def made(workshop, tmp_path):
    """Opens a run folder with finished align and score stages that hold made-up results."""

    def make(name, *overrides):
        config = load_config(workshop.config, [f"run_dir={tmp_path / name}", *overrides])
        folder = RunFolder.open(config)
        for stage in ("align", "score"):
            (folder.stage(stage) / "checkpoints" / "3").mkdir(parents=True)
            folder.finish(stage, {"steps": 3}, {"w": jnp.arange(4096.0)})
        candidates = [CandidateScore(layer, [(512, 2.0)], [(0, 2.0), (512, 1.0 + layer)]) for layer in range(3)]
        scores = {"ranking": [0, 1, 2], "candidates": [c.to_json() for c in candidates], "stability": {}}
        write_json(folder.path / "scores.json", scores)
        return folder

    return make


def test_the_folder_of_another_config(workshop, made, refused):
    run = made("run").path
    parts = ["seed: 0 -> 1", "align.learning_rate: 0.001 -> 0.1", "name=", f"--reuse {run}"]
    refused("run", workshop.config, f"run_dir={run}", "seed=1", "align.learning_rate=0.1", parts=parts)
    refused("score", workshop.config, f"run_dir={run}-2", "seed=1", "--merge", run, parts=["seed: 0 -> 1"])


def test_a_recorded_config_that_cannot_be_read(workshop, made, refused):
    folder = made("run").path
    (folder / "config.yaml").write_text("align: {tokens: -1}")
    refused("run", workshop.config, f"run_dir={folder}", parts=[f"{folder / 'config.yaml'} is damaged", "Delete it"])


def test_an_older_run_goes_on_with_the_text_it_began_with(workshop, made, refused):
    """Its config.yaml has other values than a config that is silent now gets; see test_vocabulary for their meaning."""
    run = made("run", "data.prepend_bos=false", "data.document_end_token=").path
    parts = ["data.document_end_token: null -> end_of_text", "data.prepend_bos: false -> null", f"jaxhybrid run {run}"]
    refused("run", workshop.config, f"run_dir={run}", parts=parts)
    RunFolder.open(read_settings(run, []))
    data = load_config(run / "config.yaml").data
    assert (data.prepend_bos, data.document_end_token) == (False, None)


def test_a_run_without_scores_is_not_merged(workshop, made, refused, tmp_path):
    run = made("run").path
    refused("score", workshop.config, f"run_dir={tmp_path / 'new'}", "--merge", run, parts=[f"{run} has no scores"])


@pytest.mark.parametrize("candidates", ["0:4", "3", "2:2", "-1:2", "a:b"])
def test_candidates_out_of_range(workshop, refused, tmp_path, candidates):
    arguments = ["score", workshop.config, f"run_dir={tmp_path / 'run'}", f"--candidates={candidates}"]
    refused(*arguments, parts=[candidates, "0:10" if candidates == "a:b" else "0 to 2"])


@pytest.mark.parametrize("verb", ["score", "select", "distill", "finetune", "export"])
def test_verbs_out_of_order_name_the_one_that_is_missing(workshop, refused, tmp_path, verb):
    missing = {"score": "align", "select": "score", "distill": "select", "finetune": "select", "export": "distill"}
    refused(verb, workshop.config, f"run_dir={tmp_path / 'run'}", parts=[f"jaxhybrid {missing[verb]}"])


def test_an_export_does_not_take_a_folder_that_holds_other_things(workshop, refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    parts = ["thesis", "not an earlier export", "--overwrite"]
    run = f"run_dir={tmp_path / 'run'}"
    refused("export", workshop.config, run, "--to", tmp_path / "thesis", parts=parts)
    refused("run", workshop.config, run, f"export.folder={tmp_path / 'thesis'}", parts=parts)
    assert not (tmp_path / "run" / "align").exists()  # said before anything is trained
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_parameters_of_another_shape(made):
    with pytest.raises(RunError, match=r"align/params does not fit this run.*Delete the folder .*align to train"):
        made("run").load_params("align", {"w": jnp.zeros(5)})


def test_report_of_a_mistyped_name_makes_no_folder(workshop, refused, tmp_path):
    refused("report", workshop.config, f"run_dir={tmp_path / 'rum'}", parts=["rum", "not a run folder"])
    refused("report", tmp_path / "rum", parts=["rum"])
    assert not (tmp_path / "rum").exists()
    (tmp_path / "empty").mkdir()
    for verb in ("report", "run", "inspect"):
        refused(verb, tmp_path / "empty", parts=["empty", "no config.yaml"])
    assert not list((tmp_path / "empty").iterdir())


def test_a_run_folder_stands_for_its_config_wherever_it_is(made, refused, tmp_path, monkeypatch, capsys):
    made("run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    refused("select", moved, parts=["moved/score/scores"])
    refused("run", moved, "seed=1", parts=["moved was made with another config", "seed: 0 -> 1"])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sys, "argv", ["jaxhybrid", "report", str(moved)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert f"report: {moved / 'report' / 'index.html'}" in capsys.readouterr().out


def test_what_a_finished_stage_does_not_need_is_removed(made, workshop):
    folder = made("run")
    left = folder.stage("score") / "teacher-train-000-002-0.bin", folder.stage("align") / "checkpoints"
    assert not left[1].exists()
    left[0].touch()  # by a process that was killed as it removed them
    left[1].mkdir()
    RunFolder.open(load_config(workshop.config, [f"run_dir={folder.path}"]))
    assert not any(path.exists() for path in left)
    assert (folder.stage("align") / "params").exists()


def test_a_score_that_was_deleted_is_to_be_scored_again(made, monkeypatch):
    folder = made("run")
    for layer in range(3):
        write_score(folder.stage("score") / "scores", CandidateScore(layer, [(512, 2.0)], [(0, 2.0), (512, 1.0)]))
    done = []
    monkeypatch.setattr(Pipeline, "_begins", lambda self, *_: done.append(self.folder.is_done("score")))
    pipeline = Pipeline(load_config(folder.path / "config.yaml", []))
    pipeline.score()
    (folder.stage("score") / "scores" / "001.json").unlink()
    pipeline.score()
    assert done == [True, False]


@pytest.mark.parametrize(
    ("overrides", "align", "score"),
    [
        (["select.method=uniform"], "taken from", "taken from"),
        (["finetune.learning_rate=0.1", "align.checkpoint_every=1"], "taken from", "taken from"),
        (["score.learning_rate=0.1"], "taken from", "not taken: score.learning_rate: 7e-06 -> 0.1"),
        (["align.learning_rate=0.1"], "not taken: align.learning_rate", "not taken: align.learning_rate"),
        (["seed=1", "mixer.rope=true"], "not taken: seed: 0 -> 1; mixer.rope: false -> true", "not taken: seed"),
    ],
)
def test_reuse_takes_what_the_settings_allow(made, workshop, tmp_path, overrides, align, score):
    other = made("other")
    run = RunFolder.open(load_config(workshop.config, [f"run_dir={tmp_path / 'run'}", *overrides]))
    (run.stage("align") / "checkpoints").mkdir(parents=True)  # begun here, not finished
    before = snapshot(other.path)
    outcome = run.reuse(other.path)
    assert outcome["align"].startswith(align)
    assert outcome["score"].startswith(score)
    for stage, words in outcome.items():
        taken = words.startswith("taken")
        assert run.is_done(stage) == taken
        assert (run.stage(stage) / "params").exists() == taken
        if taken:
            assert not (run.stage(stage) / "checkpoints").exists()
            with warnings.catch_warnings(action="error"):  # the checksums came along
                run.load_params(stage, {"w": jnp.zeros(4096)})
    assert (run.path / "scores.json").exists() == run.is_done("score")
    assert snapshot(other.path) == before
    assert all(words.startswith("not taken") for words in run.reuse(other.path).values())


def test_scores_that_were_stopped_for_another_budget_are_not_taken(made, workshop, tmp_path):
    stop = "score.stop_when_stable={window: 3}"
    other = made("other", stop)
    changes = [f"run_dir={tmp_path / 'run'}", stop, "select.budget=2", "select.rank_by=train"]
    outcome = RunFolder.open(load_config(workshop.config, changes)).reuse(other.path)
    assert outcome["align"].startswith("taken")
    assert outcome["score"] == (
        "not taken: select.budget: 1 -> 2, which ended scoring; select.rank_by: heldout -> train, which ended scoring"
    )


def test_reuse_of_unfinished_and_of_no_runs(made, workshop, refused, tmp_path):
    other = made("other")
    (other.stage("score") / "done.json").unlink()
    run = RunFolder.open(load_config(workshop.config, [f"run_dir={tmp_path / 'run'}"]))
    assert run.reuse(other.path)["score"] == f"not taken: not finished in {other.path}"
    arguments = ["run", workshop.config, f"run_dir={tmp_path / 'new'}", "--reuse"]
    refused(*arguments, tmp_path / "none", parts=[str(tmp_path / "none"), "not a run folder"])
    refused(*arguments, tmp_path / "new", parts=["the folder of this run itself"])


# --- storage that gives out -------------------------------------------------------------------------------------------


@contextmanager
def full(size):
    """No file can grow beyond `size` bytes, whichever library writes it: a disk that fills up, for one process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on the disk of {path}. Free some"),
        (errno.EDQUOT, "No space left on the disk of {path}. Free some"),
        (errno.EFBIG, "{path} would be larger than"),
        (errno.EROFS, "{path} cannot be written (Read-only file system). Make it writable, or choose another run_dir"),
        (errno.EACCES, "{path} cannot be written (Permission denied). Make it writable, or choose another run_dir"),
    ],
)
def test_storage_errors(tmp_path, monkeypatch, code, words):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    write_json(tmp_path / "result.json", {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunError) as error:
            write_json(tmp_path / "result.json", {"new": 2})
    assert words.format(path=tmp_path / "result.json") in str(error.value)
    assert json.loads((tmp_path / "result.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_other_errors_are_not_taken_for_storage(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "none").read_text()


def test_a_checkpoint_that_does_not_fit_does_not_count(tmp_path):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=30_000))}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {"batches": 1}, wait=True)
    with pytest.raises(RunError, match=f"{tmp_path}.* run the same command again"), full(20_000):
        checkpoints.save(2, state, {"batches": 2}, wait=True)
    again = Checkpoints(tmp_path)
    assert again.latest == 1
    assert again.restore(state)[1] == {"batches": 1}
    again.close()


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_records_that_do_not_fit(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # the bar's; pytest's own is a file

    def record():
        with closing(Recorder(tmp_path, resume_step=0, total_tokens=100, done_tokens=0, label="x")) as recorder:
            for step in range(1, 100):
                recorder.write({"step": step, "loss": 1.0})

    with pytest.raises(RunError, match=str(tmp_path)), full(size):
        record()
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < 99


def test_parameters_that_do_not_fit_leave_the_stage_unfinished(made, workshop, tmp_path):
    folder = RunFolder.open(load_config(workshop.config, [f"run_dir={tmp_path / 'run'}"]))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=30_000))}
    with pytest.raises(RunError, match="run the same command again"), full(20_000):
        folder.finish("align", {"steps": 3}, params)
    assert not folder.is_done("align")
    folder.finish("align", {"steps": 3}, params)
    np.testing.assert_array_equal(folder.load_params("align", params)["w"], params["w"])


def test_the_teachers_states_that_do_not_fit(tmp_path):
    path = tmp_path / "states.bin"

    def open_cache():
        return TeacherCache(path, 4, 2, 8, 16, np.dtype(np.float32))

    with pytest.raises(RunError, match=str(path)), full(1000):
        open_cache()
    cache = open_cache()
    rows = cache.get(3, lambda: np.ones((2, 8, 16)))
    np.testing.assert_array_equal(open_cache().get(3, lambda: rows * 0), 1)
    # A process killed while it cleared up leaves a part of the files: they are no longer trusted.
    path.with_suffix(".json").unlink()
    assert open_cache().get(3, lambda: np.zeros((2, 8, 16))).sum() == 0


def test_an_export_or_report_that_does_not_fit_leaves_nothing(made, workshop, tmp_path):
    folder = made("run")
    with pytest.raises(RunError, match="report"), full(1000):
        write_report(folder.path)
    assert not (folder.path / "report" / "index.html").exists()
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".report")]
    teacher = load_teacher(workshop.folder / "teacher")
    with pytest.raises(RunError, match=r"would be larger than .*choose another folder"), full(20_000):
        export(teacher, folder.path / "export")
    assert not (folder.path / "export").exists()
    assert not [path for path in folder.path.iterdir() if path.name.endswith(".tmp")]


def test_a_stage_that_does_not_fit_is_not_taken_over(made, workshop, tmp_path, monkeypatch):
    other = made("other")
    run = RunFolder.open(load_config(workshop.config, [f"run_dir={tmp_path / 'run'}"]))

    def another_disk(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", another_disk)
    with pytest.raises(RunError, match=f"{run.path / 'align'}"), full(4000):
        run.reuse(other.path)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "versions.json"]
    assert run.reuse(other.path)["align"].startswith("taken")
