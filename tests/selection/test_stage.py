"""What a run's settings make of scores: ranking, choice of layers, and the rule that ends scoring."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from jaxhybrid import pipeline as module
from jaxhybrid.assembly import RunModels
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import STAGES
from tests.tiny import stop_rule

# By held-out KL 1 is best and 3 next; by training KL 0 is, and 1 next.
HELDOUT, TRAIN = (0.4, 0.1, 0.3, 0.2), (0.1, 0.2, 0.4, 0.3)


@pytest.fixture
def opened(tmp_path):
    """A run whose layers are all scored; its teacher is a depth alone."""
    settings = "score: {budgets: [2]}\nselect: {method: kl_guided}\n"
    (tmp_path / "config.yaml").write_text(f"name: choice\nteacher: none\ndata: {{train: pydoc}}\n{settings}")
    scores = tmp_path / "run" / "score" / "scores"
    scores.mkdir(parents=True)
    for layer, (heldout, train) in enumerate(zip(HELDOUT, TRAIN)):
        curves = {"heldout": [[0, 5.0], [100, heldout]], "train": [[100, train]]}
        (scores / f"{layer:03d}.json").write_text(json.dumps({"layer": layer, **curves}))

    def run(*overrides):
        (tmp_path / "run" / "config.yaml").unlink(missing_ok=True)
        opened = Pipeline(load_config(tmp_path / "config.yaml", [f"run_dir={tmp_path / 'run'}", *overrides]))
        vars(opened.models)["teacher_files"] = SimpleNamespace(config=SimpleNamespace(num_layers=4))
        vars(opened)["teacher_parameters"] = 10
        return opened

    return run


def read(run, name):
    return json.loads((run.folder.path / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("by", "ranking", "kept"), [("heldout", [1, 3, 2, 0], [1, 3]), ("train", [0, 1, 3, 2], [0, 1])]
)
def test_the_ranking_goes_by_the_kl_that_is_asked_for(opened, by, ranking, kept):
    run = opened("select.budget=2", f"select.rank_by={by}")
    (run.folder.path / "scores.json").write_text('{"ranking": "of another run"}')
    assert run.select() == tuple(kept)
    layers, scores = read(run, "layers"), read(run, "scores")
    assert layers["rank_by"] == scores["rank_by"] == by
    assert layers["ranking"] == scores["ranking"] == ranking
    assert layers["other_budgets"] == {"2": kept}
    assert scores["ranking_by_heldout_kl"] == [1, 3, 2, 0]
    assert scores["ranking_by_training_kl"] == [0, 1, 3, 2]
    figures = HELDOUT if by == "heldout" else TRAIN
    assert layers["importance"] == scores["importance"] == {str(i): -kl for i, kl in enumerate(figures)}
    assert layers["stability"] == scores["stability"]["2"]


@pytest.mark.parametrize(("setting", "kept"), [("last", (1, 3)), ("first", (0, 2))])
def test_uniform_keeps_the_layers_that_are_asked_for(opened, setting, kept):
    run = opened("select.method=uniform", "select.budget=2", f"select.uniform={setting}")
    assert run.select() == kept
    assert read(run, "layers")["other_budgets"] == {"2": list(kept)}


def test_a_choice_measures_on_other_rows_than_it_trains_on(opened):
    run = opened("select.method=supernet", "select.measure.source=train")
    vars(run)["text"] = MagicMock()
    run._measured_texts()
    with run._given(run.config.select, None, None).training(run.config.select.supernet):
        pass
    for stage in STAGES:
        run.stream(stage)
    seeds = [call.args[1] for call in run.text.training_batches.call_args_list]
    assert len(seeds) == len(set(seeds)) == 2 + len(STAGES)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ("score.stop_when_stable=null", None),
        ("score.stop_when_stable={every: 3}", stop_rule(window_tokens=100_000_000, every=3)),
        ("score.stop_when_stable={window: 3, jaccard: 0.9}", stop_rule(window=3, jaccard=0.9)),
    ],
)
def test_scoring_is_told_when_to_stop_and_by_what(opened, monkeypatch, settings, rule):
    told = []
    monkeypatch.setattr(module, "score_candidates", lambda teacher, student, config, *_: told.append(config) or {})
    monkeypatch.setattr(RunModels, "candidates", lambda self: None)
    monkeypatch.setattr(Pipeline, "segment_tokens", lambda self, name: 12.5)
    run = opened("select.budget=2", "select.rank_by=train", settings)
    vars(run.models)["frozen_teacher"] = None
    vars(run).update(text=MagicMock(), disk=MagicMock())
    run.score()
    (config,) = told
    assert (config.score.stop_when_stable, config.select.budget, config.select.rank_by) == (rule, 2, "train")
    assert json.loads((run.folder.stage("score") / "done.json").read_text())["mean_segment_tokens"] == 12.5
