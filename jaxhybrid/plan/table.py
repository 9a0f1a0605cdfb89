"""Plans as text: Markdown tables, aligned so that they read well on a terminal, too."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxhybrid.disk import size_text
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.plan.collectives import KINDS
from jaxhybrid.plan.memory import GIB, Memory, advice
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.recipe import recipe, teacher_pass_flops
from jaxhybrid.plan.roofline import EFFICIENCY, roofline
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
    active = f", of which a token meets {count['teacher, for a token']:,}" if teacher.experts else ""
    lines = [
        f"teacher  {config.teacher}: {teacher.family}, {teacher.num_layers} layers of width {teacher.hidden_size:,}, "
        f"{teacher.num_heads} query heads and {teacher.num_kv_heads} K/V heads of {teacher.head_dim}, "
        f"{count['teacher']:,} parameters{active}",
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
    lines.append(f"New in it: {', '.join(found.new) or 'nothing'}.")
    if found.left:
        lines.append(f"Not taken: {', '.join(found.left)}.")
    if changed := planned.hybrid.softmax.describe():
        lines.append(f"Layers that stay softmax have, from distillation on, {' and '.join(changed)}.")
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
    moves = "a cache is read" + ", a state read and written" * (found.moved > found.state)
    return "\n".join(
        [
            markdown(["context", "teacher, MiB a sequence", "hybrid, MiB a sequence"], rows),
            "",
            f"A softmax layer keeps {found.token:,} bytes for each token, a converted one {found.state:,} in all. The "
            f"hybrid takes less memory from {found.smaller_from:,} tokens on, and a step of generation moves less from "
            f"{found.faster_from:,} on ({moves}).",
        ]
    )


# --- a slice

Figures = Mapping[str, dict[str, Any]]  # by stage


def slice_tables(planned: Planned, figures: Figures, topology: Topology) -> str:
    """Memory, exchanges, time of a step and of the whole recipe on one slice."""
    mesh = next(iter(figures.values()))["mesh"]
    sizes = ", ".join(f"{axis}: {size}" for axis, size in mesh.items() if size > 1) or "one device"
    devices = f"{topology.chips} chips" + (f" of {topology.chip.devices} devices" if topology.chip.devices > 1 else "")
    if topology.chip.kind == "tpu":
        source = "by the compiler"
        expected = f"the longest, with products at {EFFICIENCY:.0%} of the peak, an assumption"
    else:
        source = "an estimate"
        expected = "their sum, as efficient as steps measured on one H200 were"
    parts = [
        f"{topology}, {devices}, mesh {sizes}. Memory in GiB of a device, {source}:",
        memory_table(figures, topology),
        *advices(planned, figures, topology),
        "What a device receives in a step, in GiB:",
        exchange_table(figures),
        f"Time of a step in ms, by arithmetic: products at the peak of {topology.chip.tflops:,} TFLOP/s a chip, "
        f"memory, links, each by itself; expected is {expected}:",
        time_table(planned, figures, topology),
        recipe_table(planned, figures, topology),
    ]
    return "\n\n".join(parts)


def memory_table(figures: Figures, topology: Topology) -> str:
    rows = []
    for stage, found in figures.items():
        memory = Memory.of(found, topology)
        parts = (memory.parameters, memory.optimizer, memory.teacher, memory.beside, memory.all)
        rows.append([stage, *(f"{part:.2f}" for part in parts), "yes" if memory.fits else "NO"])
    all_ = f"all, of {topology.chip.usable_gib:.2f}"
    return markdown(["stage", "parameters", "optimizer", "teacher", "beside", all_, "fits"], rows)


def advices(planned: Planned, figures: Figures, topology: Topology) -> list[str]:
    """What to change, for the stages that do not fit."""
    memories = {stage: Memory.of(found, topology) for stage, found in figures.items()}
    return [
        advice(stage, getattr(planned.config, stage), memory, figures[stage]["mesh"])
        for stage, memory in memories.items()
        if not memory.fits
    ]


def exchange_table(figures: Figures) -> str:
    rows = []
    for stage, found in figures.items():
        amounts = dict.fromkeys(KINDS, 0.0)
        for part in found["exchanges"]:
            amounts[part["kind"]] += part["received"] / GIB
        least = found["least_received"] / GIB
        share = f"{sum(amounts.values()) / least:.2f}" if least else "0"
        rows.append([stage, *(f"{amounts[kind]:.2f}" for kind in KINDS), share])
    return markdown(["stage", *KINDS, "/ least"], rows)


def time_table(planned: Planned, figures: Figures, topology: Topology) -> str:
    rows = []
    for stage, found in figures.items():
        line = roofline(found, topology.chip)
        tokens = getattr(planned.config, stage).tokens_per_step
        parts = (line.math, line.memory, line.links, line.expected)
        milliseconds = [f"{1000 * part:,.1f}" for part in parts]
        teraflops = sum(found["flops"].values()) * topology.device_count / 1e12
        rows.append([stage, f"{teraflops:,.0f}", *milliseconds, line.bound, f"{tokens / line.expected:,.0f}"])
    head = ["stage", "TFLOP a step", "products", "memory", "links", "expected", "bound by", "tokens/s"]
    return markdown(head, rows)


def recipe_table(planned: Planned, figures: Figures, topology: Topology) -> str:
    """Of the stages that a run has, those in `figures`."""
    rows, most, fewest = [], 0.0, 0.0
    for stage, cost in recipe(planned).items():
        if stage not in figures:
            continue
        line = roofline(figures[stage], topology.chip)
        read = cost.teacher_passes * cost.tokens_per_step * teacher_pass_flops(planned)
        reading = read / (topology.chips * topology.chip.tflops * 1e12 * EFFICIENCY)
        hours = (cost.steps * line.expected + reading) / 3600
        fewest += (cost.fewest_steps * line.expected + reading) / 3600
        most += hours
        numbers = f"{cost.tokens / 1e6:,.0f}", f"{cost.steps:,}", f"{hours:,.2f}", f"{hours * topology.chips:,.0f}"
        rows.append([stage, *numbers, size_text(cost.disk)])
    early = f"; {fewest:,.1f} hours where scoring ends as early as it may" if fewest < most else ""
    return "\n\n".join(
        [
            "The recipe, at the expected time of a step:",
            markdown(["stage", "million tokens", "steps", "hours", "chip-hours", "disk at most"], rows),
            f"Together {most:,.1f} hours, {most * topology.chips:,.0f} chip-hours{early}. Not in it: tokenising, "
            "compiling, checkpoints, evaluation, and selection by methods that measure.",
        ]
    )


def suggestions_text(choices: Mapping[str, dict[str, Any] | None], topology: Topology) -> str:
    """The fastest settings that fit, as they go on a command line."""
    lines = [f"{topology}, the fastest of the meshes, recomputations and accumulations that fit:"]
    for stage, choice in choices.items():
        if choice is None:
            lines.append(
                f"{stage}: none, of all that were estimated to fit. Take a larger slice, or make the optimizer smaller "
                "(docs/memory.md)."
            )
            continue
        settings = " ".join(f"{key}={value}" for key, value in choice["settings"].items())
        lines.append(f"{stage}: {choice['milliseconds']:,.1f} ms a step, {choice['gib']:.2f} GiB: {settings}")
    return "\n".join(lines)
