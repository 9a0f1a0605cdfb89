"""Several runs side by side; those that differ in their seed alone become one row, with an interval over seeds.

Compared are perplexity, KL, reverse KL and agreement in rows of `evaluate.sequence_length`, recall, tasks with written
answers, and lm-eval. Figures of other lengths of rows and by position are in each run's own report.
"""

from pathlib import Path
from typing import Any

from jaxhybrid.errors import RunError
from jaxhybrid.evaluate.bootstrap import over_runs
from jaxhybrid.report.results import read_results
from jaxhybrid.report.table import Rows, is_error, recall_label, task_label
from jaxhybrid.settings.compare import fingerprint, flat
from jaxhybrid.settings.read import parse_config
from jaxhybrid.settings.run import RunConfig

# Settings of the evaluation that change no figure of a model; what is in the files shows in the prompts' hashes.
IDLE = ("batch_size", "ablations", "ruler.essays", "ruler.squad", "ruler.hotpotqa", "completion.sources")


def compare_runs(paths: list[Path]) -> tuple[list[str], Rows]:
    """Column names, and one row for each figure of each model of each kind of run: mean, interval, how many seeds.

    Raises:
        RunError: a folder is no run, has no evaluation, or two runs have the same settings and seed, or differ in their
            seed and in how they were evaluated.
    """
    groups: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {}
    measured: dict[str, dict[str, Any]] = {}  # kind of run -> how its first was evaluated
    for path in paths:
        results = read_results(path)
        if results.evaluation is None:
            raise RunError(f"{path} has no evaluation yet. Run `jaxhybrid evaluate {path}`.")
        config = parse_config(results.config)
        kind = fingerprint(config.model_copy(update={"seed": 0}))
        alike = groups.setdefault(kind, {})
        if config.seed in alike:
            raise RunError(
                f"{path} and {alike[config.seed][0]} have the same settings and seed {config.seed}: they are one run, "
                "not two. Leave one out, or train it with another seed."
            )
        own = _measured(config, results.evaluation)
        first = measured.setdefault(kind, own)
        if other := [
            f"{key}: {first.get(key)} -> {own.get(key)}" for key in first | own if first.get(key) != own.get(key)
        ]:
            raise RunError(
                f"{next(iter(alike.values()))[0]} and {path} differ in their seed alone, but were evaluated "
                "otherwise:\n"
                + "\n".join(f"  {line}" for line in other)
                + "\nEvaluate one again as the other: `jaxhybrid evaluate RUN KEY=VALUE ...`."
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


def _measured(config: RunConfig, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the figures of an evaluation depend on beside the model: settings, and hashes of the prompts."""
    idle = {f"evaluate.{key}" for key in IDLE}
    settings = {key: value for key, value in flat(config).items() if key.startswith("evaluate.") and key not in idle}
    return settings | {f"prompts of {task_label(task)}": task["hash"] for task in evaluation.get("tasks", [])}


def _figures(evaluation: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(model, figure) -> value."""
    found: dict[tuple[str, str], float] = {}
    for name, row in evaluation["models"].items():
        for key in ("perplexity", "kl", "kl_reverse", "agreement"):
            if row.get(key) is not None:
                found[name, key] = row[key]
    for task in evaluation.get("recall", []):
        if task["applies"]:
            label = f"recall of {recall_label(task)}"
            found |= {(name, label): figures["right"]["share"] for name, figures in task["models"].items()}
    for task in evaluation.get("tasks", []):
        if task["applies"]:
            found |= {(name, task_label(task)): figures["score"]["share"] for name, figures in task["models"].items()}
    for name, tasks in (evaluation.get("lm_eval") or {}).items():
        for label, figures in tasks.items():
            found |= {(name, f"{label}, {key}"): value for key, value in figures.items() if not is_error(key)}
    return found
