"""What a run records of scores and the choice they lead to, and scores brought in from another run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxhybrid.checksums import read_result, write_result
from jaxhybrid.errors import RunError
from jaxhybrid.selection.choice import Choice, Given
from jaxhybrid.selection.compare import Listed
from jaxhybrid.selection.methods import METHODS, choose
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


def choice_record(choice: Choice, given: Given, config: RunConfig, parameters: int) -> dict[str, Any]:
    """`layers.json`: the layers that stay softmax, what the choice rests on and took, and that of other budgets.

    parameters: of the teacher, those that a token meets, for the cost.
    """
    settings, by = config.select, config.select.rank_by
    record: dict[str, Any] = {
        "method": settings.method,
        "budget": settings.budget,
        "softmax_layers": list(choice.layers),
    }
    if settings.method == "kl_guided":
        record |= {"rank_by": by, "stability": given.scores().stability(len(choice.layers), by)}
    if choice.importance is not None:
        record |= {"ranking": list(choice.order)} if choice.order else {}
        record |= {"importance": {str(layer): value for layer, value in choice.importance.items()}}
    if choice.rounds:
        record["rounds"] = choice.rounds
    record |= {"cost": _cost(choice, parameters), "provenance": _provenance(config)}
    if settings.method != "explicit":
        others = {str(budget): _other(choice, given, budget) for budget in config.score.budgets}
        record["other_budgets"] = {budget: layers for budget, layers in others.items() if layers is not None}
    return record


def at_hand(run: Path) -> list[Listed]:
    """Rankings and sets that a run has written: its choice and its scores."""
    found = []
    if (run / "layers.json").exists():
        layers = read_result(run / "layers.json")
        name, ranking = f"{layers['method']} (the run's choice)", layers.get("ranking")
        found.append(Listed(name, "layers.json", order=tuple(ranking or ()), kept=tuple(layers["softmax_layers"])))
    if (run / "scores.json").exists():
        scores = read_result(run / "scores.json")
        for by in ("heldout", "training"):
            found.append(Listed(f"kl_guided ({by} KL)", "scores.json", order=tuple(scores[f"ranking_by_{by}_kl"])))
    return found


def _other(choice: Choice, given: Given, budget: int | float) -> list[int] | None:
    """What the method would keep for another budget, where it is known without measuring anew."""
    count = layers_in_budget(budget, given.depth)
    if count in choice.nested:
        return sorted(choice.order[:count])
    if METHODS[given.settings.method].needs == "nothing":
        return list(choose(replace(given, settings=given.settings.model_copy(update={"budget": count}))).layers)
    return None


def _cost(choice: Choice, parameters: int) -> dict[str, Any]:
    forward, trained = choice.cost
    return {
        "forward_tokens": forward,
        "trained_tokens": trained,
        "flops": 2 * parameters * forward + 6 * parameters * trained,
        "flops_are": "2 x parameters x tokens of forward passes, 6 x of training; attention itself is not in it",
    }


def _provenance(config: RunConfig) -> dict[str, Any]:
    """What the choice was made from."""
    settings = config.select.model_dump(mode="json")
    read = {name: settings[name] for name in config.select.reads}
    return {"needs": METHODS[config.select.method].needs, **read}


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
