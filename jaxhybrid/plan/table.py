"""Plans as text: Markdown tables, aligned so that they read well on a terminal, too."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.plan.memory import GIB, Memory
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.serving import LENGTHS, serving
from jaxhybrid.plan.surgery import OPEN, surgery
from jaxhybrid.plan.topology import Topology


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their widest cell; numbers are on the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    numbers = [all(row[column][:1].isdigit() for row in rows) for column in range(1, len(head))]
    on_the_right = [False, *numbers]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(cells, widths, on_the_right))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, on_the_right)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


# --- the model


def model_screen(planned: Planned) -> str:
    """Each layer, what it becomes and starts from, parameters, and what a sequence takes when it is served."""
    found, teacher, config = surgery(planned), planned.teacher, planned.config
    count, mixer = found.parameters, planned.config.mixer.kind
    kept = len(planned.softmax_layers)
    lines = [
        f"teacher  {config.teacher}: {teacher.family}, {teacher.num_layers} layers of width {teacher.hidden_size:,}, "
        f"{teacher.num_heads} query heads and {teacher.num_kv_heads} K/V heads of {teacher.head_dim}, "
        f"{count['teacher']:,} parameters",
        f"student  {kept} of {teacher.num_layers} layers softmax, the others {mixer}: {count['student']:,} parameters, "
        f"of which align trains {count['trained in align']:,} beside the teacher",
        "",
    ]
    becomes = {
        FULL_ATTENTION: ("stays softmax", "the teacher's", count["attention"]),
        mixer: (mixer, "see below", count["linear mixer"]),
        OPEN: (f"open: {config.select.method} keeps {kept}", f"as {mixer}, or the teacher's", count["linear mixer"]),
    }
    rows = []
    for kind, group in groupby(enumerate(found.layers), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        told = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        what, source, own = becomes[kind]
        rows.append([told, what, source, f"{own:,}", f"{count['rest of a layer']:,}"])
    lines += [markdown(["layer", "becomes", "its mixer starts from", "mixer", "norms and MLP"], rows), ""]
    taken = [name if copies == 1 else f"{name} (each head {copies} times)" for name, copies in found.taken.items()]
    lines.append(f"A {mixer} layer takes from the teacher's attention: {', '.join(taken)}.")
    lines.append(f"New in it: {', '.join(found.new)}.")
    if found.left:
        lines.append(f"Not taken: {', '.join(found.left)}.")
    if not planned.layers_are_known:
        softmax = ", ".join(map(str, planned.softmax_layers))
        lines.append(f"Until the layers are selected, plans count with {softmax} as softmax.")
    return "\n".join([*lines, "", serving_table(planned)])


def serving_table(planned: Planned) -> str:
    """Memory of one sequence by context, and where the hybrid overtakes its teacher."""
    found = serving(planned)
    rows = [
        [f"{length:,}", *(f"{n / 2**20:,.1f}" for n in (found.teacher(length), found.hybrid(length)))]
        for length in LENGTHS
    ]
    return "\n".join(
        [
            markdown(["context", "teacher, MiB a sequence", "hybrid, MiB a sequence"], rows),
            "",
            f"A softmax layer keeps {found.token:,} bytes for each token, a linear one {found.state:,} in all. The "
            f"hybrid takes less memory from {found.smaller_from:,} tokens on, and a step of generation moves less from "
            f"{found.faster_from:,} on (a cache is read, a state read and written).",
        ]
    )


# --- a slice


def steps_table(figures: Mapping[str, dict[str, Any]], topology: Topology) -> str:
    """A line for every stage: GiB of one device, and what it receives in a step."""
    rows = []
    for stage, found in figures.items():
        memory = Memory.of(found, topology)
        kinds: dict[str, float] = {}
        for part in found["received"]:
            kinds[part["kind"]] = kinds.get(part["kind"], 0) + part["bytes"] / GIB
        told = ", ".join(f"{kind} {amount:.2f}" for kind, amount in kinds.items())
        parts = (memory.parameters, memory.optimizer, memory.teacher, memory.beside, memory.all)
        rows.append([stage, *(f"{part:.2f}" for part in parts), "yes" if memory.fits else "NO", told])
    return markdown(
        ["stage", "params", "optimizer", "teacher", "beside", f"all, of {topology.chip.usable_gib:.2f}", "fits",
         "received, GiB"],
        rows,
    )  # fmt: skip
