"""The rows of scaling.py as Markdown."""

from collections.abc import Callable
from typing import Any

from jaxhybrid.plan.table import markdown

PEAK_TFLOPS = 790  # what bfloat16 products reach on an H200
Row = dict[str, Any]


def tables(rows: list[Row]) -> dict[str, str]:
    """Of each part that was measured, a table for each kind of GPU, version of JAX and shape."""
    texts: dict[str, str] = {}
    for part, table in TABLES.items():
        machines: dict[str, list[Row]] = {}
        for row in rows:
            if row["part"] == part:
                shape = f", {row['shape']}" if "shape" in row else ""
                machines.setdefault(f"{row['device']}, jax {row['jax']}{shape}:", []).append(row)
        if machines:
            texts[part] = "\n\n".join(f"{where}\n\n{table(own)}" for where, own in machines.items())
    return texts


def on_page(page: str, texts: dict[str, str]) -> str:
    """A page with the tables in place of what stands between `<!-- PART -->` and `<!-- end -->`."""
    for part, text in texts.items():
        beginning, end = f"<!-- {part} -->\n", "\n<!-- end -->"
        before, found, rest = page.partition(beginning)
        if not found or end not in rest:
            raise SystemExit(f"The page lacks the lines `<!-- {part} -->` and `<!-- end -->`.")
        page = before + found + text + rest[rest.index(end) :]
    return page


def _where(row: Row) -> list[str]:
    """Columns that tell one row from another."""
    mesh = "" if row["mesh"] == "one" else f", `{row['mesh'].replace('=', ': ').replace(' x ', ', ')}`"
    more = " ".join(f"`{text}`" for text in f"{row['flags']} {row['settings']}".split())
    return [f"{row['gpus']}{mesh}", f"{row['rows']} x {row['length']:,}", more]


def _speed(row: Row, share: str) -> list[str]:
    if "out_of_memory" in row:
        return ["does not fit", "", "", "", ""]
    tflops = row["tflops_a_gpu"]
    return [
        f"{row['tokens_per_second']:,.0f}",
        share,
        f"{tflops:,.0f}",
        f"{100 * tflops / PEAK_TFLOPS:.0f} %",
        f"{row['peak_gib']:.1f}",
    ]


SPEED = ["tokens/s", "of N times one", "model TFLOP/s a GPU", f"of {PEAK_TFLOPS}", "GiB a GPU"]


def weak(rows: list[Row]) -> str:
    """With the share of N times one GPU that has as many rows, the same flags and settings."""
    same = ("shape", "stage", "length", "documents", "flags", "settings")
    alone = {
        (row["rows"], *(str(row[name]) for name in same)): row
        for row in rows
        if row["gpus"] == 1 and "out_of_memory" not in row
    }

    def share(row: Row) -> str:
        one = alone.get((row["rows"] // row["gpus"], *(str(row[name]) for name in same)))
        if one is None or "out_of_memory" in row:
            return ""
        return f"{100 * row['tokens_per_second'] / row['gpus'] / one['tokens_per_second']:.1f} %"

    lines = [[row["stage"], *_where(row), *_speed(row, share(row))] for row in sorted(rows, key=_order)]
    return markdown(["", "GPUs", "rows x tokens", "flags and settings", *SPEED], lines)


def large(rows: list[Row]) -> str:
    lines = [[row["stage"], *_where(row), *_speed(row, "")] for row in sorted(rows, key=_order)]
    return markdown(["", "GPUs", "rows x tokens", "flags and settings", *SPEED], lines)


def context(rows: list[Row]) -> str:
    """With the share of N times the tokens a second of one GPU with the longest row that fits there."""
    fits = [row for row in rows if row["gpus"] == 1 and "out_of_memory" not in row]
    one = max(fits, key=lambda row: row["length"], default=None)

    def share(row: Row) -> str:
        if one is None or "out_of_memory" in row or row["length"] != one["length"]:
            return ""
        return f"{100 * row['tokens_per_second'] / row['gpus'] / one['tokens_per_second']:.1f} %"

    lines = [[row["stage"], *_where(row), *_speed(row, share(row))] for row in sorted(rows, key=_order)]
    return markdown(["", "GPUs", "rows x tokens", "flags and settings", *SPEED], lines)


def _order(row: Row) -> tuple[Any, ...]:
    stages = ("align", "score", "distill", "finetune")
    return row["shape"], stages.index(row["stage"]), row["gpus"], row["mesh"], -row["length"], row["flags"]


def profile(rows: list[Row]) -> str:
    """A line for each kind, of a step and a GPU."""
    lines = []
    for row in sorted(rows, key=_order):
        if "out_of_memory" in row:
            continue
        where = [row["stage"], *_where(row)]
        kinds = dict(row["kinds"])
        whole = kinds.pop("all")
        for kind, found in sorted(kinds.items(), key=lambda item: -item[1]["ms"]):
            hidden = f"{100 * found['hidden_ms'] / found['ms']:.0f} %"
            lines.append([*where, kind, f"{found['count']:.0f}", f"{found['ms']:.1f}", hidden])
        exposed = f"{100 * (1 - whole['exposed_ms'] / row['ms']):.0f} % of the step"
        lines.append([*where, "nothing else runs", "", f"{whole['exposed_ms']:.1f}", exposed])
    head = ["", "GPUs", "rows x tokens", "flags and settings", "collective", "a step", "ms", "beside other kernels"]
    return markdown(head, lines)


def decode(rows: list[Row]) -> str:
    one = {row["length"]: row for row in rows if row["gpus"] == 1}
    lines = []
    for row in sorted(rows, key=lambda row: (row["shape"], row["length"], row["gpus"])):
        alone = one.get(row["length"])
        times = f"{row['tokens_per_second'] / alone['tokens_per_second']:.2f}" if alone else ""
        bandwidth = row["moved_gb"] / row["gpus"] / row["ms"]
        lines.append(
            [str(row["gpus"]), f"{row['length']:,}", f"{row['tokens_per_second']:,.0f}", times, f"{bandwidth:.2f}"]
        )
    return markdown(["GPUs, `tensor`", "tokens of the text", "tokens/s", "times one", "TB/s a GPU"], lines)


def processes(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        gpus = f"{row['gpus']}"
        if row["harm"] == "none":
            found = (
                f"{row['equal_steps']} of {row['steps']} losses have the same bits, the largest relative difference is "
                f"{row['largest_relative_difference']:.1e}"
            )
            lines.append([gpus, "a process a GPU, against one for all", found])
        else:
            equal = "the bits" if row["equal_to_undisturbed"] else "NOT the bits"
            said = " and ".join(f"`{text}`" for text in row["errors_said"]) or "no error"
            found = (
                f"after {row['steps_done']} steps; all have ended {row['seconds_to_end']:.0f} s later with exit codes "
                f"{row['exit_codes']}, the first one saying {said} ({row['lines_said']} lines in all); "
                f"the run goes on and has {equal} of an undisturbed one"
            )
            lines.append([gpus, "one process is killed", found])
    return markdown(["GPUs", "", "found"], lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "weak": weak, "large": large, "profile": profile, "context": context, "decode": decode, "processes": processes,
}  # fmt: skip
