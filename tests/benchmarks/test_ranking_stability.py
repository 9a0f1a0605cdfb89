"""How early choices are stable: which pieces of the text a method chooses on, and the table of what it chose."""

import importlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from jaxhybrid.selection.choice import Choice

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def stability(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ranking_stability")


class Made:
    """Of eight batches of two tokens. It chooses the first batch's number, and 0 when it has all of them."""

    def __init__(self):
        self.texts = {"short": [{"tokens": np.full((1, 2), number)} for number in range(8)]}
        self.asked = list(range(8))
        self.compared_on = Namespace(kl=lambda layers: 0.5 + sum(layers))
        self.seen = []

    def choose(self, method, budget):
        numbers = [int(batch["tokens"][0, 0]) for batch in self.texts["short"]]
        assert numbers == self.asked
        self.seen.append((method, numbers))
        return Choice((numbers[0], 9), rounds=[{"forward_tokens": 1_000_000}])


def test_pieces_are_disjoint_and_compared_with_the_choice_on_most(stability, tmp_path):
    made = Made()
    options = Namespace(
        methods=["greedy_kl"], amounts=[4, 16], pieces=3, asking=["associative_recall"], samples=[5], score_amounts=[7],
        budget=2, minutes=None, score_tokens=None,
    )  # fmt: skip
    path = tmp_path / "stability.jsonl"
    for _ in range(2):  # the second time nothing is chosen again
        stability.measure(made, options, stability.Records(path, {"teacher": "made"}))
    whole = list(range(8))
    assert made.seen == [
        ("greedy_kl", [0, 1]), ("greedy_kl", [2, 3]), ("greedy_kl", [4, 5]), ("greedy_kl", whole),
        ("associative_recall:samples=5", whole), ("kl_guided", whole),
    ]  # fmt: skip
    records = [stability.json.loads(line) for line in path.read_text().splitlines()]
    rows = stability.table(records).splitlines()[2:]
    assert rows[0] == "| `greedy_kl` | 4 held-out tokens | 1.00M |  | 2, 1, 1 | 9.500, 11.500, 13.500 |"
    chosen_on = [row.split(" | ")[1] for row in rows[1:]]
    assert chosen_on == ["16 held-out tokens", "5 questions", "7 trained tokens a candidate"]
