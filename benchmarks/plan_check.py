"""What `jaxhybrid plan` says of every stage's step on this machine's GPUs, beside what is measured.

    python benchmarks/plan_check.py                        # the 1.5B shape on one H200, whole rows as documents
    python benchmarks/plan_check.py --documents 100 400    # documents of 100 to 400 tokens: less for softmax attention
    python benchmarks/plan_check.py --chip h100 --set distill.batch_size=4 score.batch_size=4

The step is the one that a run compiles for the config, with random weights and random tokens, which change nothing in
what it costs. Each stage runs in a process of its own, whose peak memory is the stage's. Median of the steps after the
first two. What a stage of a run holds beside its step (scoring's teacher) is in neither figure.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from gpus import visible_gpus
from stage_steps import CONFIG, ROOT, StageStep

from jaxhybrid.measure import peak_memory_bytes
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.plan.memory import GIB
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.roofline import roofline
from jaxhybrid.plan.steps import Steps
from jaxhybrid.plan.table import markdown
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import STAGES

# Over the default config alone: its lengths but for alignment's, with rows that fit one H200.
SETTINGS = [
    f"teacher={ROOT / 'configs' / 'teachers' / 'qwen2.5-1.5b-instruct'}",
    "mesh.context=1",
    "align.batch_size=96",
    *("score.batch_size=8", "score.kl_chunk=2048"),
    *("distill.batch_size=8", "distill.kl_chunk=2048"),
    "finetune.batch_size=2",
]


def measure(stage: str, planned: Planned, documents: list[int] | None, steps: int) -> dict[str, float]:
    """Seconds of a step, and the peak of the process's devices in bytes."""
    with jax.set_mesh(make_mesh(**planned.config.mesh.sizes)):
        measured = StageStep.of(stage, planned, documents)
        seconds = measured.seconds(steps)
        return {"seconds": float(np.median(seconds[2:])), "bytes": peak_memory_bytes(), "loss": measured.take()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="any other is taken as it is, with --set")
    parser.add_argument("--chip", default="h200", help="h100, h200 or b200")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over the config")
    parser.add_argument("--documents", nargs=2, type=int, metavar=("LEAST", "MOST"), help="tokens of a document")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--measure", choices=STAGES, help="in a process of its own: prints JSON")
    given = parser.parse_args()
    settings = SETTINGS if given.config == str(CONFIG) else []
    planned = Planned(load_config(given.config, [*settings, *given.set]))
    if given.measure:
        print(json.dumps(measure(given.measure, planned, given.documents, given.steps)))
        return
    topology = Topology.parse(f"{given.chip}:{len(visible_gpus())}")
    with tempfile.TemporaryDirectory() as folder:
        figures = Steps(topology, Path(folder), jobs=4).figures(planned, given.stages)
    rows = []
    for stage in given.stages:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", stage]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        seconds = roofline(figures[stage], topology.chip).expected
        settings = getattr(planned.config, stage)
        rows.append(
            [
                f"{stage}, {settings.batch_size} x {settings.sequence_length}",
                f"{1000 * seconds:,.0f}",
                f"{1000 * found['seconds']:,.0f}",
                f"{seconds / found['seconds']:.2f}",
                f"{figures[stage]['estimate'] / GIB:.1f}",
                f"{found['bytes'] / GIB:.1f}",
                f"{figures[stage]['estimate'] / found['bytes']:.2f}",
                f"{settings.tokens_per_step / found['seconds']:,.0f}",
            ]
        )
        print(json.dumps({"stage": stage, **found, "plan": figures[stage]}), file=sys.stderr, flush=True)
    head = ["stage", "plan, ms", "measured", "ratio", "plan, GiB", "measured", "ratio", "tokens/s measured"]
    print(f"{topology}, jax {jax.__version__}\n\n{markdown(head, rows)}")


if __name__ == "__main__":
    main()
