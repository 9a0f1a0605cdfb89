"""The evaluation of a run as rows of text, for the terminal and for the page."""

from typing import Any

Rows = list[list[str]]


def evaluation_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and one row for each model; a value a model lacks is '-'.

    Args:
        result: what `Pipeline.evaluate` returns and writes to `evaluation.json`.
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


def evaluation_table(result: dict[str, Any]) -> str:
    """Teacher and students in aligned columns: perplexity, KL to the teacher (nats per token), recall."""
    header, rows = evaluation_rows(result)
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in (header, rule, *rows)
    )
