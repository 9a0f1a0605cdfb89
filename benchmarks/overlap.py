"""Collectives in a profile: how long they take, and how much of that other kernels run beside them."""

import re
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

KINDS = {
    r"all-?gather": "gather",
    r"reduce-?scatter": "scatter",
    r"all-?reduce": "reduce",
    r"all-?to-?all": "exchange",
    r"collective-?permute|send-?recv": "neighbour",
}
Event = tuple[str | None, float, float]  # kind of a collective or None, begin and end in ns


def kind_of(kernel: str, instruction: str) -> str | None:
    """The kind of a collective's kernel, by its name or the instruction that launched it; None: of another kernel."""
    named = re.match(r"nccl\w*?_(\w+)", kernel)
    text = (named[1] if named else instruction).lower()
    for pattern, kind in KINDS.items():
        if re.match(pattern, text):
            return kind
    return "other" if named else None  # NCCL names a kernel of grouped calls by one of them, or generically


def overlap(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """Of one device, by kind: how many, their ms, and the ms of them in which other kernels run, too; under "all" the
    ms in which the device does anything, and in which it does nothing but collectives."""
    events = list(events)
    computing, busy = _merged(events, others=True), _merged(events, others=False)
    found: dict[str, dict[str, float]] = {}
    for kind, begin, end in events:
        if kind:
            row = found.setdefault(kind, {"count": 0, "ms": 0.0, "hidden_ms": 0.0})
            row["count"] += 1
            row["ms"] += (end - begin) / 1e6
            row["hidden_ms"] += float(_until(computing, end) - _until(computing, begin)) / 1e6
    all_busy, all_computing = (float(np.sum(x[:, 1] - x[:, 0])) / 1e6 for x in (busy, computing))
    found["all"] = {"busy_ms": all_busy, "exposed_ms": all_busy - all_computing}
    return found


def _merged(events: list[Event], others: bool) -> np.ndarray:
    """[n,2] intervals without overlaps, ascending; of the kernels that are no collectives, or of all."""
    merged: list[list[float]] = []
    for begin, end in sorted((begin, end) for kind, begin, end in events if not (others and kind)):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged).reshape(-1, 2)


def _until(intervals: np.ndarray, time: float) -> float:
    """How much of merged intervals lies before a time."""
    if not len(intervals):
        return 0.0
    covered = np.cumsum(intervals[:, 1] - intervals[:, 0])
    before = np.concatenate([[0.0], covered[:-1]])
    return float(np.interp(time, intervals.ravel(), np.column_stack([before, covered]).ravel()))


def collectives(folder: Path) -> list[dict[str, dict[str, float]]]:
    """`overlap` of each device in the trace that `jax.profiler.trace` wrote there."""
    (trace,) = folder.rglob("*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        events: list[Event] = []
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the others repeat what streams have
                continue
            for event in line.events:
                if not event.name.startswith("Mem"):  # copies and fills
                    instruction = str(dict(event.stats).get("hlo_op", ""))
                    begin = event.start_ns
                    events.append((kind_of(event.name, instruction), begin, begin + event.duration_ns))
        found.append(overlap(events))
    return found
