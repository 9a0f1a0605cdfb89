"""What `jaxhybrid plan --json` found for several models and slices, as the one table of docs/pods.md.

    jaxhybrid plan configs/qwen2.5-7b-instruct.yaml --topology v6e:8x8 --json > qwen2.5-7b-instruct-v6e-8x8.json
    python benchmarks/pod_table.py qwen2.5-7b-instruct-v6e-8x8.json ...

GiB of one device. "all" is the compiler's peak (of GPUs an estimate), with what a stage holds beside its step. Files
are named MODEL-KIND-SIDES.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from jaxhybrid.plan.collectives import KINDS
from jaxhybrid.plan.memory import GIB, Memory
from jaxhybrid.plan.topology import Topology

COLUMNS = (
    "model, slice, mesh", "stage", "parameters", "optimizer", "teacher", "beside", "all, of", "received", "/ least",
    "compile, CPU s",
)  # fmt: skip


def rows(name: str, topology: Topology, stages: dict[str, Any]) -> list[str]:
    lines = []
    for stage, found in stages.items():
        mesh = ", ".join(f"{axis}: {size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
        memory = Memory.of(found, topology)
        received: dict[str, float] = defaultdict(float)
        for exchange in found["exchanges"]:
            received[exchange["kind"]] += exchange["received"] / GIB
        least, compiled = found["least_received"] / GIB, found.get("compiled")
        cells = [
            "" if lines else f"{name}, {topology}, `{mesh}`",
            stage,
            *(f"{size:.2f}" for size in (memory.parameters, memory.optimizer, memory.teacher, memory.beside)),
            f"{memory.all:.2f} of {memory.usable:.2f}" + ("" if memory.fits else ", does not fit"),
            ", ".join(f"{kind} {received[kind]:.2f}" for kind in KINDS if received[kind] >= 0.005),
            f"{sum(received.values()) / least:.2f}" if least else "",  # one device receives nothing
            f"{compiled['compile_cpu_seconds']:.0f}" if compiled else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for path in parser.parse_args().plans:
        for topology, stages in json.loads(path.read_text())["topologies"].items():
            name = path.stem.removesuffix(f"-{topology.replace(':', '-')}")
            print("\n".join(rows(name, Topology.parse(topology), stages)))


if __name__ == "__main__":
    main()
