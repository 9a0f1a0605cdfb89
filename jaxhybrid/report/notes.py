"""What a run says while it is at work."""

from pathlib import Path
from typing import Any

from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import StageConfig

COSTS = {"forward_tokens": "forward", "trained_tokens": "in training"}
FEW_TOKENS = 10_000_000  # below this, distillation has only begun


def segments(name: str, stage: StageConfig, mean: float) -> str:
    """How long a piece of text is in a stage's rows: it bounds the context that is trained."""
    return f"{name}: rows of {stage.sequence_length:,} tokens, a segment has {mean:,} on average"


def alignment(before: float, after: float) -> str:
    return f"align: held-out loss {before:.4f} before the first step, {after:.4f} after the last"


def choice(record: dict[str, Any]) -> str:
    """Of `layers.json`."""
    kept = f"select: {record['method']} keeps layers {record['softmax_layers']} softmax"
    cost, last = record["cost"], record.get("rounds", [{}])[-1]
    last = {} if "of" in last else last  # the last set of a method that was asked is not the choice
    untrained = "" if cost["trained_tokens"] else " without training"
    reached = f", KL {last['kl']:.4f}{untrained}" if "kl" in last else ""
    spent = [f"{cost[name]:,} tokens {what}" for name, what in COSTS.items() if cost[name]]
    return f"{kept}{reached}" + (f" ({' and '.join(spent)}, {cost['flops']:.1e} FLOPs)" if spent else "")


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
