"""A study of made-up measurements: its order, what it does not do again, and its table of training on the text."""

import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest

from jaxhybrid.selection.choice import Choice, ranked

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPTIONS = {
    "main": ["greedy_kl"], "others": ["cosine", "smart"], "random": 0, "budgets": [2, 1], "seeds": 2, "minutes": None,
    "score_tokens": 1, "distill_tokens": 8, "distill_batch": 2, "finetune_tokens": 4,
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class Made:
    """A study of four layers whose figures are made up; it notes what it is asked."""

    depth, parameters = 4, 10
    student = "aligned"

    def __init__(self):
        self.asked = []

    def choose(self, method, budget):
        self.asked.append((method, budget))
        if method == "cosine":
            return ranked({0: 4.0, 1: 1.0, 2: 3.0, 3: 2.0}, budget)
        if method == "smart":  # scores, but no ranking
            return Choice({2: (1, 3), 1: (2,)}[budget], importance=dict.fromkeys(range(4), 0.0))
        if method == "perplexity":
            raise ValueError("no text")
        return Choice((0, 1)[:budget], (0, 1)[:budget], range(1, budget + 1))

    def untrained(self, layers):
        return {"kl": 1.0, "kl_long": 1.0}

    def measured(self, student, layers):
        return {
            "kl": 0.5,
            "kl_long": 0.5,
            "cross_entropy": 3.0 if student == "aligned" else 2.0,
            "recall": {"4": [9, 10]},
        }

    def distilled(self, layers, seed):
        self.asked.append(("distilled", layers, seed))
        return "distilled"

    def finetuned(self, layers, seed):
        self.asked.append(("finetuned", layers, seed))
        return "finetuned"


def run(module, path, **changes):
    study, made = module("selection_study"), Made()
    study.run(made, Namespace(**OPTIONS | changes), study.Records(path, {"teacher": "made"}))
    return made.asked


def test_a_study_is_made_once_and_in_order(module, tmp_path):
    path = tmp_path / "study.jsonl"
    assert run(module, path) == [
        ("greedy_kl", 2), ("distilled", (0, 1), 0), ("greedy_kl", 1), ("distilled", (0,), 0), ("distilled", (0, 1), 1),
        ("finetuned", (0, 1, 2, 3), 0), ("finetuned", (0, 1), 0),
        ("cosine", 2), ("distilled", (0, 2), 0), ("smart", 2), ("distilled", (1, 3), 0),
        ("smart", 1), ("distilled", (2,), 0),
    ]  # fmt: skip
    found = [json.loads(line) for line in path.read_text().splitlines()]
    sets = {(r["method"], r["budget"]): r["layers"] for r in found if r["kind"] == "choice"}
    assert sets == {
        ("greedy_kl", 2): [0, 1], ("greedy_kl", 1): [0], ("cosine", 2): [0, 2], ("cosine", 1): [0],
        ("smart", 2): [1, 3], ("smart", 1): [2],
    }  # fmt: skip
    assert run(module, path) == []
    assert run(module, path, others=["single_kl"], budgets=[2]) == [("single_kl", 2)]  # its set has been distilled


def test_a_method_that_fails_is_named_and_keeps_no_other_from_its_turn(module, tmp_path):
    with pytest.raises(SystemExit, match=r"perplexity, 2: ValueError: no text\nperplexity, 1"):
        run(module, tmp_path / "study.jsonl", others=["perplexity", "cosine"])
    assert '"cosine"' in (tmp_path / "study.jsonl").read_text()


def test_out_of_time_ends_a_study_between_measurements(module, tmp_path):
    assert run(module, tmp_path / "study.jsonl", minutes=0) == []


def test_teacher_and_hybrid_trained_on_the_text_stand_side_by_side(module, tmp_path):
    run(module, tmp_path / "study.jsonl")
    tables = module("study_tables")
    rows = tables.finetuned(tables.Measured(tmp_path / "study.jsonl")).splitlines()
    assert [row.split(" | ")[0:3:2] for row in rows[2:]] == [
        ["| teacher", "20.09"], ["| teacher, finetuned", "7.39"],
        ["| 0 1, distilled", "7.39"], ["| 0 1, finetuned", "7.39"],
    ]  # fmt: skip
