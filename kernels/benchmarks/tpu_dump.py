"""Reads what the TPU compiler writes about one compiled program: bundles, loops, branches, slots, VMEM.

A bundle is what the core issues in one cycle. The compiler's own tables are static: they count every bundle once. Here
each counts as often as it is issued: a loop's body by its trips, what a branch skips by how often it is not skipped
(tpu_branches.py). A bundle count is a time without waiting: neither for memory, nor for a matrix unit that takes
instructions faster than it works them off.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from tpu_branches import Branch, count_branches

# Only the last stage of the compiler's many listings is needed; all of them would be hundreds of megabytes.
DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*(final|delay).*"
)
# Older versions of libtpu count matrix instructions as one slot, MXU.
BOUNDS = ("MXU", "MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VSTORE")
SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:[\s>]*\{")
MATMUL = re.compile(r"= vmatmul\.([a-z0-9.]+)")
PUSH = re.compile(r"= vmatpush")
BRANCH = re.compile(r"%(\w+) = sbr\.rel ")
STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
DELAY_SLOTS = 4  # bundles after a branch that are issued whether it is taken or not
ALLOCATION = re.compile(r"space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)")


@dataclass
class Program:
    """One program of the compiled module: a Pallas kernel, or one of XLA's own fusions."""

    name: str
    is_kernel: bool
    bundles: int  # issued in all
    grid_steps: int  # how often most of its loops' bundles are issued (1: there is no loop)
    step_bundles: float  # issued in loops, per grid step
    loop_bundles: int  # static bundles in loop bodies (all bundles where there is no loop)
    seldom_bundles: int  # those of them that are issued at fewer than all grid steps
    uncertain: int  # bundles counted as issued though a branch of unknown condition may skip them
    spills: int  # fills and spills in what is issued at every grid step, static
    seldom_spills: int  # in the rest of the loops
    vmem: int  # bytes
    slots: dict[str, float] = field(default_factory=dict)  # instructions issued over capacity, in bundles, by slot
    matmul_rows: float = 0  # rows given to matrix units; a unit takes a fixed number of them per cycle
    matmuls: float = 0
    pushes: float = 0
    loops_known: bool = True

    @property
    def bound(self) -> tuple[str, float]:
        """The slot nearest to full and the share of bundles in which it is."""
        name = max(BOUNDS, key=lambda slot: self.slots.get(slot, 0.0))
        return name, self.slots[name] / self.bundles

    def as_dict(self) -> dict:
        return asdict(self) | {"bound": self.bound}


def read_programs(folder: Path) -> list[Program]:
    """Every program dumped into the folder, in the order they were compiled."""
    listings = sorted(path for path in folder.glob("*-final_bundles.txt") if "schedule-analysis" not in path.name)
    return [program for path in listings if (program := _read_program(path)) is not None]


def _read_program(listing: Path) -> Program | None:
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", listing.name)
    name = stem.split("-", 1)[1]
    if name == "TLP" or name.startswith("<"):  # the caller of the programs, and its start and end
        return None
    folder = listing.parent
    code = _only(folder, stem, "post-delay-converter.txt").read_text()
    slot_names, capacity, used = _read_slots(_only(folder, stem, "final_hlo-static-per-bundle-utilization.txt"))
    analysis = _only(folder, stem, "schedule-analysis_final_bundles.txt").read_text(errors="replace")
    bundles = _read_bundles(listing)
    if len(used) != len(bundles):
        raise ValueError(f"{listing.name} has {len(bundles)} bundles, its table of slots {len(used)} rows.")
    kinds_of = [MATMUL.findall(bundle) for bundle in bundles]
    rows_of = [sum(map(_rows, kinds)) for kinds in kinds_of]
    branches = count_branches(code)
    stretches = _find_stretches(bundles, branches)
    times, doubted, in_loop = [1] * len(bundles), [False] * len(bundles), [False] * len(bundles)
    for stretch in stretches:
        for i in range(stretch.start, stretch.stop):
            times[i] = stretch.times
            doubted[i] |= not (stretch.known or stretch.loops)
            in_loop[i] |= stretch.loops
    looped = [i for i in range(len(bundles)) if in_loop[i]]
    inside = looped or range(len(bundles))
    grid_steps = Counter(times[i] for i in inside).most_common(1)[0][0]
    fills = [sum(row[slot_names.index(slot)] for slot in SPILLS) for row in used]

    def issued(counts: list[int]) -> int:
        return sum(n * count for n, count in zip(times, counts))

    totals = {slot: issued([row[i] for row in used]) for i, slot in enumerate(slot_names)}
    return Program(
        name=re.sub(r"\.\d+$", "", name),
        is_kernel="tpu_custom_call" in analysis,
        bundles=sum(times),
        grid_steps=grid_steps,
        step_bundles=sum(times[i] for i in inside) / grid_steps,
        loop_bundles=len(inside),
        seldom_bundles=sum(times[i] < grid_steps for i in inside),
        uncertain=sum(n for n, doubt in zip(times, doubted) if doubt),
        spills=sum(fills[i] for i in inside if times[i] >= grid_steps),
        seldom_spills=sum(fills[i] for i in inside if times[i] < grid_steps),
        vmem=_read_vmem(code),
        slots={slot: totals[slot] / capacity[i] for i, slot in enumerate(slot_names)},
        matmuls=issued([len(kinds) for kinds in kinds_of]),
        pushes=issued([len(PUSH.findall(bundle)) for bundle in bundles]),
        matmul_rows=issued(rows_of),
        loops_known=all(stretch.known for stretch in stretches if stretch.loops),
    )


def _read_bundles(listing: Path) -> list[str]:
    """The text of each; some run over several lines."""
    bundles: list[str] = []
    with listing.open(errors="replace") as lines:
        for line in lines:
            if BUNDLE.match(line):
                bundles.append(line)
            elif bundles:
                bundles[-1] += line
    return bundles


def _rows(kind: str) -> int:
    """That a matrix instruction takes."""
    return 16 if "bf16" in kind else 32 if re.search(r"[fsu]8", kind) else 8


class Stretch(NamedTuple):
    """Bundles [start, stop) that are issued equally often but for stretches inside."""

    start: int
    stop: int
    times: int
    loops: bool
    known: bool


def _find_stretches(bundles: list[str], branches: dict[str, Branch]) -> list[Stretch]:
    """A loop's body, or what a branch ahead skips; those inside others come later."""
    labelled = [(i, STARTS.findall(text)) for i, text in enumerate(bundles) if BUNDLE.match(text).group(1)]
    place = {region: i for i, regions in labelled for region in regions}
    stretches = []
    for i, text in enumerate(bundles):
        for name in BRANCH.findall(text):
            branch, after = branches[name], min(i + 1 + DELAY_SLOTS, len(bundles))
            to = place.get(branch.target)
            if to is None:  # the listing does not mark where: all is taken to be run
                continue
            if to <= i:
                stretches.append(Stretch(to, after, branch.met, True, branch.known))
            elif after < to:
                stretches.append(Stretch(after, to, branch.met - branch.taken, False, branch.known))
    return sorted(stretches, key=lambda stretch: stretch.start - stretch.stop)


def _only(folder: Path, stem: str, ending: str) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith(f"{stem}-") and path.name.endswith(ending))


def _read_slots(path: Path) -> tuple[list[str], list[int], list[list[int]]]:
    """Slot names, instructions each takes per bundle, and the number issued for every bundle."""
    lines = path.read_text().splitlines()
    rows = [[int(number) for number in line.split()] for line in lines[4:] if line.strip()]
    return [name.strip() for name in lines[1].split(",")], [int(number) for number in lines[2].split()], rows


def _read_vmem(code: str) -> int:
    """Bytes of VMEM up to the last allocation: scratch, both copies of each window, spills."""
    return max((int(size, 0) + int(offset, 0) for size, offset in ALLOCATION.findall(code)), default=0)
