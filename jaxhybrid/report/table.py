"""The evaluation of a run as rows of text, for the terminal and for the page."""

from typing import Any

Rows = list[list[str]]

RECALL_COLUMNS = {  # key of a figure -> heading
    "right": "right (95 %)",
    "first_query": "1st asked",
    "later_queries": "later",
    "first_third": "1st third",
    "middle_third": "2nd",
    "last_third": "3rd",
    "first_token": "1st token",
    "another_name": "another's",
}


def evaluation_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and one row for each model; a value a model lacks is '-'.

    Args:
        result: what `evaluation.json` holds. Runs of earlier versions hold figures
            `recall_N` of another probe, which become columns.
    """
    models: dict[str, dict[str, Any]] = result["models"]
    keys = {key for row in models.values() for key in row if key.startswith("recall_")}
    recalls = sorted(keys, key=lambda key: int(key.removeprefix("recall_")))
    header = ["model", "perplexity", "KL", *recalls]

    def cell(row: dict[str, Any], key: str, form: str, unit: str = "", scale: float = 1) -> str:
        return f"{format(row[key] * scale, form)}{unit}" if row.get(key) is not None else "-"

    return header, [
        [
            name,
            cell(row, "perplexity", ",.2f"),
            cell(row, "kl", ".4f"),
            *(cell(row, recall, ".1f", " %", 100) for recall in recalls),
        ]
        for name, row in models.items()
    ]


def recall_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and one row for each model of each recall task that the teacher can do; what chance gives first."""
    rows = []
    for task in result.get("recall", []):
        if not task["applies"]:
            continue
        label, chance = recall_label(task), task["chance"]
        rows.append([label, "chance", *(_percent(chance[key]) if key in chance else "-" for key in RECALL_COLUMNS)])
        for name, figures in task["models"].items():
            rows.append([label, name, *(_share(key, figures.get(key)) for key in RECALL_COLUMNS)])
    return ["recall of", "model", *RECALL_COLUMNS.values()], rows


def recall_refusals(result: dict[str, Any]) -> list[str]:
    """A sentence for each recall task that the teacher cannot do, so that no student is measured by it."""
    sentences = []
    for task in (task for task in result.get("recall", []) if not task["applies"]):
        right = task["models"]["teacher"]["right"]
        prose = f" with {task['filler_tokens']:,} tokens of prose" if task["filler_tokens"] else ""
        sentences.append(
            f"Recall of {task['pairs']} pairs{prose} does not apply to this teacher: {_percent(right['share'])} of its "
            f"answers are right ({100 * right['low']:.0f}-{100 * right['high']:.0f}), too few to compare students by."
        )
    return sentences


def recall_label(task: dict[str, Any]) -> str:
    """'16 pairs', '16 pairs + 2,048': with so many tokens of prose"""
    filler = task["filler_tokens"]
    return f"{task['pairs']} pairs" + (f" + {filler:,}" if filler else "")


ROUND_COLUMNS = ("round", "layer", "softmax layers", "KL", "sets compared", "on tokens", "again on all")


def round_row(found: dict[str, Any]) -> list[str]:
    """One round of a greedy selection under `ROUND_COLUMNS`; a value it lacks is '-'."""
    layer = "-" if found["layer"] is None else str(found["layer"])
    return [
        found["action"],
        f"{layer} for {found['out']}" if "out" in found else layer,
        str(len(found["kept"])),
        f"{found['kl']:.4f}",
        f"{len(found['scores'])}",
        f"{found['tokens']:,}",
        str(len(found["rescored"])) if "rescored" in found else "-",
    ]


def evaluation_table(result: dict[str, Any]) -> str:
    """Teacher and students in aligned columns: perplexity and KL to the teacher (nats per token), then recall."""
    parts = [_aligned(*evaluation_rows(result), left=1)]
    header, rows = recall_rows(result)
    if rows:
        parts.append(_aligned(header, rows, left=2))
    return "\n\n".join([*parts, *recall_refusals(result)])


def _aligned(header: list[str], rows: Rows, left: int) -> str:
    """`left`: how many columns are words."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells: list[str]) -> str:
        words = [cell.ljust(width) for cell, width in zip(cells[:left], widths)]
        return "  ".join([*words, *(cell.rjust(width) for cell, width in zip(cells[left:], widths[left:]))])

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))


def _share(key: str, figure: dict[str, float] | None) -> str:
    if figure is None:
        return "-"
    between = f" ({100 * figure['low']:.0f}-{100 * figure['high']:.0f})" if key == "right" else ""
    return _percent(figure["share"]) + between


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
