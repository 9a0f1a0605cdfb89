"""What lies in a run folder, read once for the report. A part that is not there yet is None or empty."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxhybrid.checksums import read_result
from jaxhybrid.errors import RunError
from jaxhybrid.selection.ranking import CandidateScore, Scores
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.stages import STAGES
from jaxhybrid.settings.types import RankBy
from jaxhybrid.train.metrics import Record, read_metrics, training_figures

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class StageResult:
    """One stage: its summary when it is done, its records from the first step on."""

    name: str
    status: str  # "done", "started" or "not run"
    summary: dict[str, Any]
    records: list[Record]

    def curve(self) -> Points:
        """(tokens, training loss)"""
        return [(r["tokens"], r["loss"]) for r in self.records if "loss" in r]

    def figures(self) -> dict[str, Any]:
        """Steps, tokens, speed and losses: from the summary, or from the records so far while the stage is not done."""
        return self.summary or training_figures(self.records)


@dataclass(frozen=True)
class Results:
    """Everything of a run that the report shows."""

    path: Path
    config_text: str
    config: dict[str, Any]
    versions: dict[str, Any]
    stages: dict[str, StageResult]
    scores: Scores | None
    score_budgets: dict[str, list[dict[str, float]]]  # budget as written in the config -> rows of Scores.stability
    rank_by: RankBy  # which curves the layers are ranked by
    layers: dict[str, Any] | None
    evaluation: dict[str, Any] | None

    @property
    def kept(self) -> list[int]:
        """Indices of the layers that stay softmax."""
        return self.layers["softmax_layers"] if self.layers else []

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Of one greedy selection, as `layers.json` has them."""
        found = (self.layers or {}).get("rounds", [])
        return found if found and found[0]["action"] == "start" and "of" not in found[0] else []

    @property
    def depth(self) -> int | None:
        """Layers of the model, where a result tells."""
        if self.scores:
            return len(self.scores.candidates)
        if self.layers and "importance" in self.layers:
            return len(self.layers["importance"])
        return len(self.stages["align"].summary.get("heldout_layer_loss_before", [])) or None

    @property
    def recall(self) -> list[dict[str, Any]]:
        """The recall tasks that the teacher can do, as `evaluation.json` has them."""
        return [task for task in (self.evaluation or {}).get("recall", []) if task["applies"]]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks with written answers that the teacher can do."""
        return [task for task in (self.evaluation or {}).get("tasks", []) if task["applies"]]

    def stability(self) -> dict[str, list[dict[str, float]]]:
        """Rows of `Scores.stability` by a label of the budget; the chosen budget comes first."""
        if not self.scores:
            return {}
        depth = len(self.scores.candidates)
        labelled = {budget_label(budget, depth): rows for budget, rows in self.score_budgets.items()}
        if self.layers is None or "stability" not in self.layers:  # chosen without scores
            return labelled
        chosen = budget_label(str(self.layers["budget"]), depth)
        labelled.pop(chosen, None)
        return {f"{chosen}, chosen": self.layers["stability"], **labelled}


def budget_label(budget: str, depth: int) -> str:
    """'0.25' of 30 layers -> '25 % (8 layers)'; '6' -> '6 layers'."""
    if "." not in budget:
        return f"{budget} layers"
    return f"{100 * float(budget):g} % ({layers_in_budget(float(budget), depth)} layers)"


def read_results(path: Path) -> Results:
    """Reads the run folder `path`.

    Raises:
        RunError: it is no run folder, or a file in it is damaged; names it.
    """
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise RunError(f"{path} is not a run folder: it has no config.yaml. Give a folder that `jaxhybrid run` made.")
    text = config_file.read_text()
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{config_file} is not valid YAML ({error}). Restore what the run was made with.") from error
    if not isinstance(config, dict):
        raise RunError(f"{config_file} holds {config!r}, not settings. Restore what the run was made with.")
    scores = _read(path / "scores.json")
    return Results(
        path,
        text,
        config,
        _read(path / "versions.json") or {},
        {name: _read_stage(path / name) for name in STAGES},
        Scores(tuple(CandidateScore.from_json(c) for c in scores["candidates"])) if scores else None,
        scores["stability"] if scores else {},
        scores.get("rank_by", "heldout") if scores else "heldout",
        _read(path / "layers.json"),
        _read(path / "evaluation.json"),
    )


def _read(path: Path) -> Any:
    return read_result(path) if path.exists() else None


def _read_stage(folder: Path) -> StageResult:
    summary = _read(folder / "done.json")
    status = "done" if summary is not None else "started" if folder.exists() else "not run"
    return StageResult(folder.name, status, summary or {}, read_metrics(folder, (summary or {}).get("records")))
