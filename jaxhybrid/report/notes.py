"""What a run says while it is at work."""

from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.report.table import evaluation_rows
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import Part, StageConfig

COSTS = {"forward_tokens": "forward", "trained_tokens": "in training"}
FEW_TOKENS = 10_000_000  # below this, distillation has only begun


def segments(name: str, stage: StageConfig, mean: float) -> str:
    """How long a piece of text is in a stage's rows: it bounds the context that is trained."""
    return f"{name}: rows of {stage.sequence_length:,} tokens, a segment has {mean:,} on average"


def alignment(before: float, after: float) -> str:
    return f"align: held-out loss {before:.4f} before the first step, {after:.4f} after the last"


def calibration(config: RunConfig, measured: dict[str, np.ndarray]) -> str:
    """Which initial values were measured, and over what they range."""
    units = {"half_lives": ("half-lives", " tokens"), "strengths": ("write strengths", ""), "scales": ("scales", "")}
    found = [
        f"{name} {x.min():.3g} to {x.max():.3g}{unit}, median {np.median(x):.3g}"
        for key, (name, unit) in units.items()
        if (x := measured.get(key)) is not None
    ]
    found += ["open gates"] * ("gate" in config.calibrated_parts)
    takes = LINEAR_MIXERS[config.mixer.kind].takes(config.mixer.to_model())
    missing = [part for part in get_args(Part) if part not in takes]
    told = f" ({config.mixer.kind} takes no {' and no '.join(missing)})" if missing else ""
    return f"align: begins at measured values: {'; '.join(found)}{told}"


def choice(record: dict[str, Any]) -> str:
    """Of `layers.json`."""
    kept = f"select: {record['method']} keeps layers {record['softmax_layers']} softmax"
    cost, last = record["cost"], record.get("rounds", [{}])[-1]
    last = {} if "of" in last else last  # the last set of a method that was asked is not the choice
    untrained = "" if cost["trained_tokens"] else " without training"
    reached = f", KL {last['kl']:.4f}{untrained}" if "kl" in last else ""
    spent = [f"{cost[name]:,} tokens {what}" for name, what in COSTS.items() if cost[name]]
    return f"{kept}{reached}" + (f" ({' and '.join(spent)}, {cost['flops']:.1e} FLOPs)" if spent else "")


def model_card(config: RunConfig, evaluation: dict[str, Any] | None) -> str:
    """How a run made its hybrid, and the figures of its evaluation, as sections of a model card."""
    sources = ", ".join(Path(source).name if Path(source).is_absolute() else source for source in config.data.train)
    stages = {name: getattr(config, name).tokens for name in ("align", "distill", "finetune")}
    trained = ", ".join(f"{name} {tokens:,}" for name, tokens in stages.items())
    text = (
        "## How it was made\n\n"
        "Linear layers were aligned to the attention they replace, the hybrid was distilled from the base model by KL, "
        "and finetuned\n(RADLADS, arXiv 2505.03005). "
        f"The softmax layers were chosen by `{config.select.method}`.\n\nTokens: {trained}. Text: {sources}."
    )
    if evaluation is None:
        return text
    header, rows = evaluation_rows(evaluation, made=False)
    lines = [header, ["---"] * len(header), *rows]
    return f"{text}\n\n## Figures\n\nHeld-out text.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def end_of_run(config: RunConfig, exported: Path, page: Path) -> str:
    """Where the results are and, of a run far below the papers' budget, what it can and cannot show."""
    places = f"exported to {exported}\nreport: {page}"
    distilled, choice = config.distill.tokens, ""
    if distilled >= FEW_TOKENS:
        return places
    if "scores" in config.select.needs:
        choice = f"It scored each layer on {config.score.tokens:,}, they on 200 million: the choice is mostly noise.\n"
    return (
        f"\nThis run distilled on {distilled:,} tokens; the papers use 600 million.\n{choice}"
        "It shows that every stage works, that the losses fall, and that the export loads. It does not show\n"
        f"how good such a hybrid is: do not judge it by this table.\n\n{places}"
    )
