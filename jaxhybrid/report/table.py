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


QUALITY_COLUMNS = {  # key of a figure -> heading, form, unit, scale
    "perplexity": ("perplexity", ",.2f", "", 1),
    "kl": ("KL", ".4f", "", 1),
    "kl_reverse": ("reverse KL", ".4f", "", 1),
    "agreement": ("same token", ".1f", " %", 100),
}
MADE_COLUMNS = {"trained_tokens": "trained on", "seed": "seed", "config": "config", "hardware": "hardware"}
FIFTHS = ("0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %")


def evaluation_rows(result: dict[str, Any], made: bool = True) -> tuple[list[str], Rows]:
    """Column names, and one row for each model; a value a model lacks is '-'.

    Args:
        result: what `evaluation.json` holds. Runs of earlier versions have fewer figures, and `recall_N` of another
            probe, which become columns.
        made: say how each model was made, too, where that is recorded.
    """
    models: dict[str, dict[str, Any]] = result["models"]
    known = {key for row in models.values() for key in row} | {"perplexity", "kl"}
    earlier = sorted((key for key in known if key.startswith("recall_")), key=lambda key: int(key.partition("_")[2]))
    columns = {key: column for key, column in QUALITY_COLUMNS.items() if key in known}
    columns |= {key: (key, ".1f", " %", 100) for key in earlier}
    told = {key: name for key, name in MADE_COLUMNS.items() if made and key in known}

    def cell(row: dict[str, Any], key: str) -> str:
        _, form, unit, scale = columns[key]
        if row.get(key) is None:
            return "-"
        low, high = (scale * end for end in (row.get("intervals") or {}).get(key, (0, 0)))
        between = f" ({low:{form}}-{high:{form}})" if low < high else ""
        return f"{row[key] * scale:{form}}{unit}{between}"

    header = ["model", *(name for name, *_ in columns.values()), *told.values()]
    return header, [
        [name, *(cell(row, key) for key in columns), *(_made(row.get(key)) for key in told)]
        for name, row in models.items()
    ]


def _made(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def quality_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and for each length of rows and model its figures: whole, then by position in the document."""
    rows = []
    for measured in result.get("quality", []):
        for name, figures in measured["models"].items():
            parts = [("all", figures)]
            parts += [(f"{bucket['first']:,} to {bucket['end'] - 1:,}", bucket) for bucket in figures["positions"]]
            for place, part in parts:
                cells = [f"{part[key] * scale:{form}}{unit}" for key, (_, form, unit, scale) in QUALITY_COLUMNS.items()]
                rows.append([f"{measured['sequence_length']:,}", name, place, f"{part['tokens']:,}", *cells])
    return ["rows of", "model", "positions", "tokens", *(name for name, *_ in QUALITY_COLUMNS.values())], rows


def task_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and one row for each model of each task with written answers that the teacher can do; what chance
    gives first."""
    rows = []
    for task in (task for task in result.get("tasks", []) if task["applies"]):
        label = task_label(task)
        if task["chance"] is not None:
            rows.append([label, "chance", _percent(task["chance"]), *["-"] * (2 + len(FIFTHS))])
        for name, figures in task["models"].items():
            depths = {round(5 * part["first"]): _percent(part["share"]) for part in figures.get("depths", [])}
            shares = ("right", "score"), ("first_token", "first_token"), ("another", "another")
            cells = [_share(key, figures.get(figure)) for key, figure in shares]
            rows.append([label, name, *cells, *(depths.get(number, "-") for number in range(len(FIFTHS)))])
    return ["task", "model", "score (95 %)", "1st token", "another's", *FIFTHS], rows


def lm_eval_rows(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and one row for each figure of each task of lm-eval."""
    models = result.get("lm_eval") or {}
    found = {(task, name) for tasks in models.values() for task, figures in tasks.items() for name in figures}

    def cell(figures: dict[str, float], name: str) -> str:
        error = figures.get(_error_of(name))
        return f"{figures[name]:.4f}" + ("" if error is None else f" (+-{1.96 * error:.4f})")

    return ["task of lm-eval", "figure", *models], [
        [task, name, *(cell(tasks[task], name) for tasks in models.values())]
        for task, name in sorted(found)
        if not is_error(name)
    ]


def is_error(name: str) -> bool:
    """Whether a figure of lm-eval is the standard error of another: 'acc_stderr', 'exact_match_stderr,strict-match'."""
    return name.partition(",")[0].endswith("_stderr")


def _error_of(name: str) -> str:
    metric, comma, filtered = name.partition(",")
    return f"{metric}_stderr{comma}{filtered}"


def task_label(task: dict[str, Any]) -> str:
    """'niah_single_1, 4,096', 'fda'"""
    return task["task"] + (f", {task['length']:,}" if task["length"] else "")


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
    """A sentence for each task that the teacher cannot do, so that no student is measured by it."""
    sentences = []
    for task in (task for task in result.get("recall", []) if not task["applies"]):
        right = task["models"]["teacher"]["right"]
        prose = f" with {task['filler_tokens']:,} tokens of prose" if task["filler_tokens"] else ""
        sentences.append(
            f"Recall of {task['pairs']} pairs{prose} does not apply to this teacher: {_percent(right['share'])} of its "
            f"answers are right ({100 * right['low']:.0f}-{100 * right['high']:.0f}), too few to compare students by."
        )
    for task in (task for task in result.get("tasks", []) if not task["applies"]):
        score = task["models"]["teacher"]["score"]
        sentences.append(
            f"{task_label(task)} does not apply to this teacher: it scores {_percent(score['share'])} "
            f"({100 * score['low']:.0f}-{100 * score['high']:.0f}), too little to compare students by."
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
    """Teacher and students in aligned columns: perplexity and KL to the teacher (nats per token), recall and tasks."""
    parts = [aligned(*evaluation_rows(result), left=1)]
    for header, rows in (recall_rows(result), task_rows(result), lm_eval_rows(result)):
        if rows:
            parts.append(aligned(header, rows, left=2))
    return "\n\n".join([*parts, *recall_refusals(result)])


def aligned(header: list[str], rows: Rows, left: int) -> str:
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


def comparison_rows(found: dict[str, Any]) -> tuple[list[str], Rows]:
    """Column names, and a row for each list of layers: its overlap and rank correlation with those that are not
    published, which are the columns."""
    pairs = {frozenset((pair["a"], pair["b"])): pair for pair in found["pairs"]}
    columns = [one["name"] for one in found["lists"] if not one["published"]]

    def cell(row: str, column: str) -> str:
        if row == column:
            return ""
        pair = pairs[frozenset((row, column))]
        return f"{pair['jaccard']:.2f}" + ("" if pair["correlation"] is None else f" {pair['correlation']:+.2f}")

    return ["", "layers", *columns], [
        [one["name"], " ".join(map(str, one["layers"])), *(cell(one["name"], column) for column in columns)]
        for one in found["lists"]
    ]
