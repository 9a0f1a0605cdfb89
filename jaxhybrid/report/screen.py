"""A run as one screen of a terminal."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxhybrid.disk import size_text
from jaxhybrid.report.table import comparison_rows, evaluation_rows

PIPED_WIDTH = 120  # characters, where there is no terminal to ask
PIPED_TABLE = 1000  # of a table that programs may read: no line is broken
STATE_STYLE = {"done": "green", "damaged": "red", "not begun": "dim"}


def _console(piped_width: int = PIPED_WIDTH) -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = piped_width
    return console


def print_comparison(found: dict[str, Any]) -> None:
    """Prints what `Pipeline.compare` found."""
    header, rows = comparison_rows(found)
    console, papers = _console(PIPED_TABLE), [one for one in found["lists"] if one["published"]]
    console.print(_table(header, [list(map(Text, row)) for row in rows], left=2))
    told = [
        f"Overlap (Jaccard) of {found['count']} of {found['depth']} layers, and rank correlation (Spearman) where both "
        f"are rankings. Two random sets overlap by {found['jaccard_of_random_sets']:.2f} on average.",
        *dict.fromkeys(f"{one['name'].split(': ')[0]}: {one['source']}" for one in papers),
    ]
    if not papers:
        told.append(f"No list is published for a teacher of {found['depth']} layers.")
    console.print()
    for sentence in told:
        console.print(sentence, soft_wrap=True)


def print_run(found: dict[str, Any]) -> None:
    """Prints what `inspect_run` found; in colours on a terminal only."""
    console = _console()

    def line(label: str, text: str, style: str = "") -> None:
        console.print(Text.assemble((f"{label:9} ", "bold"), (text, style)), soft_wrap=True)

    line("run", found["path"])
    line("teacher", str(found["teacher"]))
    if found["softmax_layers"] is not None:
        kept = found["softmax_layers"]
        depth = f" of {found['layers']}" if found["layers"] else ""
        line("layers", f"{len(kept)}{depth} layers softmax, by {found['method']}: {' '.join(map(str, kept))}")
    console.print()
    console.print(_stage_table(found))
    if found["evaluation"]:
        header, rows = evaluation_rows(found["evaluation"], made=False)
        console.print()
        console.print(_table(header, [list(map(Text, row)) for row in rows]))
    console.print()
    for name in ("export", "report"):
        line(name, found[name] or "not yet")
    for message in found["damaged"]:
        line("damaged", message, "red")
    line("next", found["next"], "bold")


def _stage_table(found: dict[str, Any]) -> Table:
    header = ["stage", "state", "tokens", "tokens/s", "loss", "time", "disk"]
    rows = []
    for name, stage in found["stages"].items():
        numbers = [
            "-" if stage["tokens"] is None else f"{stage['tokens']:,}",
            "-" if stage["tokens_per_second"] is None else f"{stage['tokens_per_second']:,.0f}",
            "-" if stage["loss_first"] is None else f"{stage['loss_first']:.4g} > {stage['loss_last']:.4g}",
            "-" if stage["seconds"] is None else duration(stage["seconds"]),
            size_text(stage["disk_bytes"]) if stage["disk_bytes"] else "-",
        ]
        state = Text(_state(name, stage, found), STATE_STYLE.get(stage["state"], "yellow"))
        rows.append([Text(name), state, *map(Text, numbers)])
    return _table(header, rows, left=2)


def _table(header: list[str], rows: list[list[Text]], left: int = 1) -> Table:
    """Columns of text, then right-aligned ones of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _state(name: str, stage: dict[str, Any], found: dict[str, Any]) -> str:
    if name == "score" and stage["state"] == "not begun" and not found["needs_scores"]:
        return "not needed"
    if stage["state"] != "begun":
        return stage["state"]
    if name == "score":
        return f"{stage['scored']} of {found['layers'] or '?'} layers"
    saved = "none" if stage["checkpoint"] is None else stage["checkpoint"]
    return f"step {stage['step'] or 0} of {stage['steps'] or '?'}, {saved} saved"


def duration(seconds: float) -> str:
    """'3 h 12 min', '4 min 5 s', '12 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
