"""Reads what the TPU compiler writes about one compiled program: bundles, loops, slots, VMEM.

A bundle is what the core issues in one cycle. The compiler's own tables are static: they count the bundles of a loop's
body once, so loops are paired here with the trip counts that its listing states. A bundle count is a time without
waiting: neither for memory, nor for a matrix unit that takes instructions faster than it works them off.
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Only the last stage of the compiler's many listings is needed; all of them would be hundreds of megabytes.
DUMP_FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false "
    "--xla_jf_dump_llo_pass_label_regex=.*(final|delay).*"
)
# Older versions of libtpu count matrix instructions as one slot, MXU.
BOUNDS = ("MXU", "MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VSTORE")
SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")

BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{")
MATMUL = re.compile(r"= vmatmul\.([a-z0-9.]+)")
PUSH = re.compile(r"= vmatpush")
LOOP = re.compile(r"^\s*loop: start=(\S+), step=(\S+), limit=(\S+)")
ALLOCATION = re.compile(r"space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+)")


@dataclass
class Program:
    """One program of the compiled module: a Pallas kernel, or one of XLA's own fusions."""

    name: str
    is_kernel: bool
    bundles: float  # issued in all, loops counted as often as they run
    grid_steps: int  # trips of the outermost loop (1: there is none)
    step_bundles: float  # issued in one trip of it
    loop_bundles: int  # static bundles in loop bodies (of all bundles where there is no loop)
    spills: int  # fills and spills among them
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
    limits = _read_loops(code)
    analysis = _only(folder, stem, "schedule-analysis_final_bundles.txt").read_text(errors="replace")

    marks, matmuls_of, pushes_of, rows_of = [], [], [], []
    with listing.open(errors="replace") as lines:
        for line in lines:
            match = BUNDLE.match(line)
            if match is None:
                continue
            kinds = MATMUL.findall(line)
            marks.append((match.group(1) == "LB", match.group(2).count(">")))
            matmuls_of.append(len(kinds))
            pushes_of.append(len(PUSH.findall(line)))
            rows_of.append(sum(16 if "bf16" in kind else 32 if re.search(r"[fsu]8", kind) else 8 for kind in kinds))
    if len(used) != len(marks):
        raise ValueError(f"{listing.name} has {len(marks)} bundles, its table of slots {len(used)} rows.")
    loops = _find_loops(marks)
    known = len(loops) == len(limits) and None not in limits
    weight_of = [1] * len(marks)
    for (start, stop), trips in zip(loops, limits):
        for i in range(start, stop):
            weight_of[i] *= trips or 1
    longest = max(range(len(loops)), key=lambda n: sum(weight_of[slice(*loops[n])]), default=None)
    grid_steps = 1 if longest is None or longest >= len(limits) else limits[longest] or 1
    in_step = range(len(marks)) if longest is None else range(*loops[longest])
    in_loops = sorted({i for start, stop in loops for i in range(start, stop)}) or range(len(marks))
    total = {slot: sum(w * row[i] for w, row in zip(weight_of, used)) for i, slot in enumerate(slot_names)}
    return Program(
        name=re.sub(r"\.\d+$", "", name),
        is_kernel="tpu_custom_call" in analysis,
        bundles=sum(weight_of),
        grid_steps=grid_steps,
        step_bundles=sum(weight_of[i] for i in in_step) / grid_steps,
        loop_bundles=len(in_loops),
        spills=sum(used[i][slot_names.index(slot)] for i in in_loops for slot in SPILLS),
        vmem=_read_vmem(code),
        slots={slot: total[slot] / capacity[i] for i, slot in enumerate(slot_names)},
        matmuls=sum(w * n for w, n in zip(weight_of, matmuls_of)),
        pushes=sum(w * n for w, n in zip(weight_of, pushes_of)),
        matmul_rows=sum(w * n for w, n in zip(weight_of, rows_of)),
        loops_known=known,
    )


def _find_loops(marks: list[tuple[bool, int]]) -> list[tuple[int, int]]:
    """Bundles [start, stop) of each loop, from (begins a loop, depth) of every bundle.

    A loop ends with the last bundle of its depth: bundles without a depth, or with that of code moved in from outside,
    lie within it.
    """
    loops = []
    for start, (begins, depth) in enumerate(marks):
        if not begins:
            continue
        stop = start + 1
        for i in range(start + 1, len(marks)):
            begins_other, depth_here = marks[i]
            if begins_other and depth_here <= depth:
                break
            if depth_here >= depth:
                stop = i + 1
        loops.append((start, stop))
    return loops


def _only(folder: Path, stem: str, ending: str) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith(f"{stem}-") and path.name.endswith(ending))


def _read_slots(path: Path) -> tuple[list[str], list[int], list[list[int]]]:
    """Slot names, instructions each takes per bundle, and the number issued for every bundle."""
    lines = path.read_text().splitlines()
    rows = [[int(number) for number in line.split()] for line in lines[4:] if line.strip()]
    return [name.strip() for name in lines[1].split(",")], [int(number) for number in lines[2].split()], rows


def _read_loops(code: str) -> list[int | None]:
    """Trips of each loop in the order of their bodies; None where a limit is computed.

    The loop over a grid runs two steps longer than the grid, to fill and drain its pipeline of copies.
    """
    trips: list[int | None] = []
    pipelined = re.compile(r"iteration index, stage = \d")
    sections = re.split(r"(?m)^(?=\s*loop: start=)", code)[1:]
    for section in sections:
        numbers = LOOP.match(section).groups()
        try:
            start, step, limit = (int(number, 0) for number in numbers)
        except ValueError:
            trips.append(None)
            continue
        count = -(-(limit - start) // step)
        trips.append(count - 2 if pipelined.search(section[:6000]) and count > 2 else count)
    return trips


def _read_vmem(code: str) -> int:
    """Bytes of VMEM up to the last allocation: scratch, both copies of each window, spills."""
    return max((int(size, 0) + int(offset, 0) for size, offset in ALLOCATION.findall(code)), default=0)
