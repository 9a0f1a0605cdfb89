"""What a run records of scores and the choice they lead to, and scores brought in from another run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jaxhybrid.checksums import read_result, write_result
from jaxhybrid.errors import RunError
from jaxhybrid.selection.methods import select_layers
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.compare import differences, fingerprint
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.types import RankBy


def scores_record(scores: Scores, config: RunConfig) -> dict[str, Any]:
    """`scores.json`: curves, ranking by either one, and, by the one that `select.rank_by` names, importance and
    stability for each budget to follow."""
    depth, by = len(scores.candidates), config.select.rank_by
    budgets = {str(budget): layers_in_budget(budget, depth) for budget in config.score.budgets}
    return {
        "rank_by": by,
        "ranking": scores.ranking(by),
        "ranking_by_heldout_kl": scores.ranking("heldout"),
        "ranking_by_training_kl": scores.ranking("train"),
        "importance": _importance(scores, by),
        "stability": {name: scores.stability(count, by) for name, count in budgets.items()},
        "candidates": [candidate.to_json() for candidate in scores.candidates],
    }


def choice_record(config: RunConfig, depth: int, scores: Callable[[], Scores]) -> dict[str, Any]:
    """`layers.json`: the layers of `depth` that stay softmax, what the choice rests on, and that of other budgets.

    scores: asked only by the method that goes by them.
    """
    settings = config.select
    choose = partial(
        select_layers,
        settings.method,
        depth,
        layers=settings.layers or (),
        seed=settings.seed,
        uniform_by=settings.uniform,
        scores=scores,
        rank_by=settings.rank_by,
    )
    layers = list(choose(settings.budget))
    record: dict[str, Any] = {"method": settings.method, "budget": settings.budget, "softmax_layers": layers}
    if settings.method == "kl_guided":
        measured, by = scores(), settings.rank_by
        record |= {
            "rank_by": by,
            "ranking": measured.ranking(by),
            "importance": _importance(measured, by),
            "stability": measured.stability(len(layers), by),
        }
    if settings.method != "explicit":
        record["other_budgets"] = {str(budget): list(choose(budget)) for budget in config.score.budgets}
    return record


def _importance(scores: Scores, by: RankBy) -> dict[str, float]:
    return {str(layer): value for layer, value in scores.importance(by).items()}


def merge_scores(folder: Path, config: RunConfig, other: Path) -> None:
    """Takes the finished candidates of the run in `other` (scored on another machine, say) into `folder`.

    Raises:
        RunError: that run was made by a config that gives other results, or has no scores.
    """
    theirs = load_config(other / "config.yaml", [])
    if fingerprint(theirs) != fingerprint(config):
        changed = "\n".join(f"  {line}" for line in differences(theirs, config))
        raise RunError(f"{other} was made with another config, so its scores do not compare:\n{changed}")
    files = sorted((other / "score" / "scores").glob("*.json"))
    if not files:
        raise RunError(f"{other} has no scores to merge: no candidate is finished there.")
    for file in files:
        write_result(folder / file.name, read_result(file))
