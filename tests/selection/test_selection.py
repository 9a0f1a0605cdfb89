"""Ranking, stability and the selection methods, on made-up scores with known answers."""

import json
from itertools import pairwise

import pytest

from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.selection.methods import layer_types, select_layers
from jaxhybrid.selection.ranking import CandidateScore, Scores, jaccard, read_scores
from jaxhybrid.settings.budget import layers_in_budget
from tests.tiny import stop_rule

# Layer 2 is best all along; 0 overtakes 3 at 200 tokens.
KLS = {0: [5, 3.0, 1.0, 0.9], 1: [5, 4.0, 3.0, 2.9], 2: [5, 1.0, 0.5, 0.4], 3: [5, 2.0, 1.5, 1.4]}
SCORES = Scores(
    tuple(
        CandidateScore(
            layer,
            train=[(100, kls[1] + layer), (200, kls[2] + layer), (300, kls[3] + layer)],
            heldout=[(t, kl) for t, kl in zip((0, 100, 200, 300), kls)],
        )
        for layer, kls in KLS.items()
    )
)


def test_lower_kl_ranks_first():
    assert SCORES.ranking("heldout") == [2, 0, 3, 1]
    assert SCORES.ranking("train") == [0, 2, 1, 3]
    assert SCORES.importance()[2] == -0.4


def test_stability_follows_the_top_set():
    rows = SCORES.stability(2)
    assert [row["tokens"] for row in rows] == [100, 200, 300]
    assert rows[0]["with_final"] == pytest.approx(1 / 3)  # {2,3} against {2,0}
    assert rows[1]["with_previous"] == pytest.approx(1 / 3)
    assert rows[2]["with_previous"] == 1.0
    assert SCORES.is_stable(stop_rule(window=1), 2)
    assert not SCORES.is_stable(stop_rule(window=2), 2)
    assert not SCORES.is_stable(stop_rule(window=5, jaccard=0.0), 2)
    assert jaccard(frozenset(), frozenset()) == 1.0


def test_stability_lasts_as_many_tokens_as_the_rule_asks():
    assert SCORES.is_stable(stop_rule(window_tokens=100), 2)  # {2,0} at 200 and at 300
    assert not SCORES.is_stable(stop_rule(window_tokens=101), 2)  # {2,3} at 100
    assert SCORES.is_stable(stop_rule(window_tokens=200, jaccard=0.33), 2)
    assert not SCORES.is_stable(stop_rule(window_tokens=201, jaccard=0.0), 2)  # not measured for so long
    assert SCORES.is_stable(stop_rule(window_tokens=200), 1)
    assert SCORES.is_stable(stop_rule(window_tokens=200), 2, "train")  # {0,2} all along
    assert not SCORES.is_stable(stop_rule(window_tokens=200), 2, "heldout")


def test_a_plateau_shorter_than_the_window_does_not_end_scoring():
    """What was seen of SmolLM2: the same eight at 131 and 262 thousand tokens, others at 393."""
    first, later = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 3.0, 2: 2.0}
    kls = [first, first, later, later, later, later]

    def measured(count):
        points = list(enumerate(kls[:count], 1))
        return Scores(tuple(CandidateScore(i, [], [(t * 100, kl[i]) for t, kl in points]) for i in range(3)))

    stable = [measured(count).is_stable(stop_rule(window_tokens=300), 2) for count in range(1, 7)]
    assert stable == [False, False, False, False, False, True]


def test_kl_guided_takes_the_top_k():
    assert select_layers("kl_guided", 4, 2, scores=lambda: SCORES) == (0, 2)
    assert select_layers("kl_guided", 4, 0.25, scores=lambda: SCORES) == (2,)
    assert select_layers("kl_guided", 4, 0.25, scores=lambda: SCORES, rank_by="train") == (0,)


@pytest.mark.parametrize(
    ("depth", "budget", "by", "expected"),
    [
        (28, 0.25, "last", (3, 7, 11, 15, 19, 23, 27)),  # Llama-3.2-3B
        (28, 0.125, "last", (6, 13, 20, 27)),
        (36, 0.25, "first", (0, 4, 8, 12, 16, 20, 24, 28, 32)),  # Qwen2.5-3B
        (36, 0.125, "first", (0, 8, 16, 24, 32)),
        (4, 4, "last", (0, 1, 2, 3)),
        (4, 4, "first", (0, 1, 2, 3)),
    ],
)
def test_uniform_matches_the_published_lists(depth, budget, by, expected):
    assert select_layers("uniform", depth, budget, uniform_by=by) == expected


@pytest.mark.parametrize("by", ["last", "first"])
def test_uniform_lists_are_spread_evenly(by):
    for depth in range(1, 50):
        for count in range(1, depth + 1):
            layers = select_layers("uniform", depth, count, uniform_by=by)
            assert len(set(layers)) == count
            assert layers == tuple(sorted(layers))
            assert (layers[0] == 0) if by == "first" else (layers[-1] == depth - 1)
            gaps = {b - a for a, b in pairwise(layers)}
            assert len(gaps) <= 2
            assert layers[-1] < depth
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_random_is_seeded_and_explicit_is_sorted():
    draws = [select_layers("random", 30, 8, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 8
    assert select_layers("explicit", 30, 8, layers=[9, 2]) == (2, 9)


@pytest.mark.parametrize(
    ("budget", "depth", "count"), [(0.25, 36, 9), (0.125, 36, 5), (0.125, 28, 4), (0.25, 30, 8), (6, 30, 6)]
)
def test_budgets_round_as_the_papers(budget, depth, count):
    assert layers_in_budget(budget, depth) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "uniform", "budget": 31}, "keeps 31 layers, but the model has 30"),
        ({"method": "uniform", "budget": 0}, "keeps no softmax layer"),
        ({"method": "uniform", "budget": 1.5}, "fraction lies between 0 and 1"),
        ({"method": "explicit", "budget": 1, "layers": [3, 30]}, r"names \[30\]; the model's layers are 0 to 29"),
        ({"method": "explicit", "budget": 1, "layers": [3, 3]}, "more than once"),
        ({"method": "explicit", "budget": 1}, "needs select.layers"),
        ({"method": "kl_guided", "budget": 1}, "needs scores"),
        ({"method": "kl_guidd", "budget": 1}, "'kl_guidd' is unknown"),
    ],
)
def test_bad_selections_are_refused(arguments, message):
    arguments = dict(arguments)
    method, budget = arguments.pop("method"), arguments.pop("budget")
    with pytest.raises(ConfigError, match=message):
        select_layers(method, 30, budget, **arguments)


def test_missing_scores_are_named(tmp_path):
    for candidate in SCORES.candidates[:2]:
        (tmp_path / f"{candidate.layer:03d}.json").write_text(json.dumps(candidate.to_json()))
    with pytest.raises(RunError, match=r"2 of 4 layers have no score .*\[2, 3\].*--candidates 2:4"):
        read_scores(tmp_path, 4)
    for candidate in SCORES.candidates:
        (tmp_path / f"{candidate.layer:03d}.json").write_text(json.dumps(candidate.to_json()))
    assert read_scores(tmp_path, 4) == SCORES


def test_layer_types():
    assert layer_types(3, (1,), "gated_deltanet") == ("gated_deltanet", "full_attention", "gated_deltanet")
