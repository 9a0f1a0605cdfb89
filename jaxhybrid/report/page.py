"""One HTML page of a run: it carries its plots inside, so it can be mailed; the same plots lie beside it as PNGs."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from jaxhybrid.files import draft_of, make_folder, storage_errors
from jaxhybrid.report import plots
from jaxhybrid.report.results import Results, StageResult, budget_label, read_results
from jaxhybrid.report.table import (
    ROUND_COLUMNS,
    evaluation_rows,
    lm_eval_rows,
    quality_rows,
    recall_refusals,
    recall_rows,
    round_row,
    task_rows,
)
from jaxhybrid.settings.select import SelectConfig
from jaxhybrid.settings.stages import STAGES

LOSS = {
    "align": "alignment loss",
    "distill": "KL to the teacher (nats per token)",
    "finetune": "cross entropy (nats per token)",
}
CAPTION = {
    "align": "How far the linear mixers' outputs are from the teacher's attention outputs: norm of the difference over "
    "the square root of the width, mean over layers and tokens.",
    "distill": "KL from the teacher's distribution to the student's on training text, over the full vocabulary.",
    "finetune": "Cross entropy of the student on training text.",
}


@dataclass(frozen=True)
class Picture:
    """A plot as the page shows it."""

    name: str  # of the PNG, without .png
    alt: str
    data: str  # the PNG in base64


def write_report(run_folder: Path) -> Path:
    """Writes `RUN/report/index.html` and its PNGs from whatever the run has measured so far.

    Each file is written under a temporary name and renamed, the page last. Plots that an earlier report had and this
    one has not are removed.

    Raises:
        RunError: `run_folder` is no run folder, or a file in it is damaged; names it.
    """
    run_folder = Path(run_folder)
    results = read_results(run_folder)
    target = make_folder(run_folder / "report")
    with storage_errors(target), draft_of(target) as scratch:
        scratch.mkdir()
        pictures: dict[str, Picture] = {}
        with plots.plot_style():
            for name, (figure, alt) in _figures(results).items():
                file = scratch / f"{name}.png"
                figure.savefig(file)
                pictures[name] = Picture(name, alt, base64.b64encode(file.read_bytes()).decode())
        (scratch / "index.html").write_text(_render(results, pictures), encoding="utf-8")
        for name in pictures:
            (scratch / f"{name}.png").replace(target / f"{name}.png")
        page = (scratch / "index.html").replace(target / "index.html")
        for stale in FIGURES - pictures.keys():
            (target / f"{stale}.png").unlink(missing_ok=True)
    return page


FIGURES = {
    "positions", "tasks", "depths", "recall", "importance", "candidate_curves", "stability", "layer_importance",
    "kept_curve", "layer_losses", "align", "distill", "finetune",
}  # fmt: skip


def _figures(results: Results) -> dict[str, tuple[Figure, str]]:
    """The plots this run has data for, with a description of each, by file name."""
    figures: dict[str, tuple[Figure, str]] = {}
    quality = (results.evaluation or {}).get("quality", [])
    if any(len(figures["positions"]) > 1 for measured in quality for figures in measured["models"].values()):
        figures["positions"] = plots.positions(quality), "Perplexity and KL by position in the document"
    if results.tasks:
        figures["tasks"] = plots.tasks(results.tasks), "Score in each task with written answers"
    if deep := [task for task in results.tasks if "depths" in task["models"]["teacher"]]:
        figures["depths"] = plots.depths(deep), "Share of answers found, by depth in the haystack"
    if results.recall:
        figures["recall"] = plots.recall(results.recall), "Share of right answers in each recall task"
    if results.scores:
        scored = results.scores, results.kept, results.rank_by
        figures["importance"] = plots.importance(*scored), "Importance of each layer"
        figures["candidate_curves"] = (
            plots.candidate_curves(*scored),
            f"{plots.CURVES[results.rank_by].capitalize()} KL of each candidate over training tokens",
        )
        if budgets := {name: rows for name, rows in results.stability().items() if rows}:
            figures["stability"] = plots.stability(budgets), "Overlap of the chosen sets over training tokens"
    elif results.layers and "importance" in results.layers:
        figures["layer_importance"] = (
            plots.layer_importance(results.layers["importance"], results.kept),
            f"What {results.layers['method']} measured for each layer",
        )
    if results.rounds:
        figures["kept_curve"] = plots.kept_curve(results.rounds), "KL by the number of softmax layers"
    aligned = results.stages["align"].summary
    if "heldout_layer_loss_after" in aligned:
        figures["layer_losses"] = (
            plots.layer_losses(aligned["heldout_layer_loss_before"], aligned["heldout_layer_loss_after"]),
            "Held-out alignment loss of each layer before and after training",
        )
    for name, loss in LOSS.items():
        if curve := results.stages[name].curve():
            figures[name] = plots.training_curve(curve, loss), f"Training loss of the {name} stage over tokens"
    return figures


def _render(results: Results, pictures: dict[str, Picture]) -> str:
    # Every value comes from files: autoescape keeps their text from becoming markup.
    environment = Environment(
        loader=PackageLoader("jaxhybrid", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header, rows = evaluation_rows(results.evaluation) if results.evaluation else ([], [])
    select = results.config.get("select") or {}
    method = (results.layers or {}).get("method") or select.get("method", SelectConfig().method)
    return environment.get_template("page.html.j2").render(
        name=results.config.get("name", results.path.name),
        teacher=results.config.get("teacher", "not named"),
        mixer=(results.config.get("mixer") or {}).get("kind"),
        method=method,
        curves=plots.CURVES[results.rank_by],
        kept=results.kept,
        depth=results.depth,
        layers=results.layers,
        other_budgets=_other_budgets(results),
        cost=(results.layers or {}).get("cost"),
        round_columns=ROUND_COLUMNS,
        round_rows=list(map(round_row, results.rounds)),
        evaluation=results.evaluation,
        evaluation_header=header,
        evaluation_rows=rows,
        recall=recall_rows(results.evaluation or {}),
        quality=quality_rows(results.evaluation or {}),
        tasks=task_rows(results.evaluation or {}),
        lm_eval=lm_eval_rows(results.evaluation or {}),
        recall_refusals=recall_refusals(results.evaluation or {}),
        pictures=pictures,
        statuses={name: results.stages[name].status for name in STAGES},
        stage_rows=[_stage_row(results.stages[name]) for name in STAGES],
        captions=CAPTION,
        config_text=results.config_text,
        versions=results.versions,
    )


def _other_budgets(results: Results) -> dict[str, str]:
    """Budget -> the layers the same method would keep for it."""
    budgets = (results.layers or {}).get("other_budgets", {})
    return {
        budget_label(budget, results.depth) if results.depth else budget: ", ".join(map(str, layers))
        for budget, layers in budgets.items()
    }


def _stage_row(stage: StageResult) -> list[str]:
    """Name, status, and the stage's figures as text."""
    figures = stage.figures()

    def cell(value: Any, form: str) -> str:
        return "–" if value is None else format(value, form)

    memory = figures.get("peak_memory_bytes")
    return [
        stage.name,
        stage.status,
        cell(figures.get("steps"), ",d"),
        cell(figures.get("tokens", figures.get("candidate_tokens")), ",d"),
        cell(figures.get("mean_segment_tokens"), ",.0f"),
        cell(figures.get("tokens_per_second"), ",.0f"),
        cell(memory / 2**30 if memory is not None else None, ".2f"),
        cell(figures.get("loss_first"), ".4f"),
        cell(figures.get("loss_last"), ".4f"),
    ]
