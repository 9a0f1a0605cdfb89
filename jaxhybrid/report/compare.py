"""Several runs side by side; those that differ in their seed alone become one row, with an interval over seeds."""

from pathlib import Path
from typing import Any

from jaxhybrid.errors import RunError
from jaxhybrid.evaluate.bootstrap import over_runs
from jaxhybrid.report.results import read_results
from jaxhybrid.report.table import Rows, task_label
from jaxhybrid.settings.compare import fingerprint
from jaxhybrid.settings.read import parse_config


def compare_runs(paths: list[Path]) -> tuple[list[str], Rows]:
    """Column names, and one row for each figure of each model of each kind of run: mean, interval, how many seeds.

    Raises:
        RunError: a folder is no run, has no evaluation, or two runs have the same settings and seed.
    """
    groups: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {}
    for path in paths:
        results = read_results(path)
        if results.evaluation is None:
            raise RunError(f"{path} has no evaluation yet. Run `jaxhybrid evaluate {path}`.")
        config = parse_config(results.config)
        alike = groups.setdefault(fingerprint(config.model_copy(update={"seed": 0})), {})
        if config.seed in alike:
            raise RunError(
                f"{path} and {alike[config.seed][0]} have the same settings and seed {config.seed}: they are one run, "
                "not two. Leave one out, or train it with another seed."
            )
        alike[config.seed] = str(path), results.evaluation
    rows = []
    for alike in groups.values():
        name = next(iter(alike.values()))[0]
        found = [_figures(evaluation) for _, evaluation in alike.values()]
        for figure in dict.fromkeys(key for figures in found for key in figures):
            values = [figures[figure] for figures in found if figure in figures]
            told = over_runs(values)
            between = "-" if told["low"] is None else f"{told['low']:.4f} to {told['high']:.4f}"
            rows.append([name, *figure, f"{told['mean']:.4f}", between, str(len(values))])
    return ["run", "model", "figure", "mean", "95 % over seeds", "seeds"], rows


def _figures(evaluation: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(model, figure) -> value."""
    found: dict[tuple[str, str], float] = {}
    for name, row in evaluation["models"].items():
        for key in ("perplexity", "kl", "kl_reverse", "agreement"):
            if row.get(key) is not None:
                found[name, key] = row[key]
    for task in evaluation.get("recall", []):
        if task["applies"]:
            label = f"recall of {task['pairs']} pairs + {task['filler_tokens']}"
            found |= {(name, label): figures["right"]["share"] for name, figures in task["models"].items()}
    for task in evaluation.get("tasks", []):
        if task["applies"]:
            found |= {(name, task_label(task)): figures["score"]["share"] for name, figures in task["models"].items()}
    return found
