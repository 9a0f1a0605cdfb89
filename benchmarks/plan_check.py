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
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from jaxhybrid.stages.programs import stage_program

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "qwen2.5-3b-instruct.yaml"
# Over the default config alone: its lengths but for alignment's, with rows that fit one H200.
SETTINGS = [
    f"teacher={ROOT / 'configs' / 'teachers' / 'qwen2.5-1.5b-instruct'}",
    "mesh.context=1",
    "align.batch_size=96",
    *("score.batch_size=8", "score.kl_chunk=2048"),
    *("distill.batch_size=8", "distill.kl_chunk=2048"),
    "finetune.batch_size=2",
]


def random_values(abstract: Any, seed: int) -> Any:
    """Arrays of these shapes, types and places: normal for weights, zeros for counts. One at a time, so that no more
    memory is taken than they lie in."""

    def one(number: int, leaf: Any) -> jax.Array:
        def make(key: jax.Array) -> jax.Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.zeros(leaf.shape, leaf.dtype)
            return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

        return jax.block_until_ready(jax.jit(make, out_shardings=leaf.sharding)(jax.random.key(1000 * seed + number)))

    leaves, tree = jax.tree.flatten(abstract)
    return jax.tree.unflatten(tree, [one(number, leaf) for number, leaf in enumerate(leaves)])


def batch_values(abstract: Any, vocab_size: int, documents: list[int] | None) -> Any:
    """Random tokens in documents of so many tokens, at least and at most; None: each row is one."""
    rng = np.random.default_rng(0)
    shape = abstract["tokens"].shape
    ids = np.ones(shape, np.int32)
    if documents:
        for row in ids.reshape(-1, shape[-1]):
            ends = np.cumsum(rng.integers(*documents, size=shape[-1] // documents[0] + 1))
            row[:] = np.searchsorted(ends, np.arange(shape[-1]), side="right") + 1
    values = {"tokens": rng.integers(0, vocab_size, size=shape, dtype=np.int32), "segment_ids": ids}
    placed = {name: jax.device_put(value, abstract[name].sharding) for name, value in values.items()}
    return placed | random_values({name: x for name, x in abstract.items() if name not in values}, seed=2)


def measure(stage: str, planned: Planned, documents: list[int] | None, steps: int) -> dict[str, float]:
    """Seconds of a step, and the peak of the process's devices in bytes."""
    student = planned.linear if stage in ("align", "score") else planned.hybrid
    mesh = make_mesh(**planned.config.mesh.sizes)
    with jax.set_mesh(mesh):
        step, (state, *rest) = stage_program(stage, planned.config, student, planned.teacher, mesh)
        state = random_values(state, seed=0)
        absolute = jax.jit(lambda tree: jax.tree.map(jnp.abs, tree), donate_argnums=0)  # no second moment is negative
        state = replace(state, optimizer=absolute(state.optimizer))
        given = [
            batch_values(x, planned.teacher.vocab_size, documents) if isinstance(x, dict) else random_values(x, seed=1)
            for x in rest
        ]
        times = []
        for _ in range(steps + 2):
            began = time.perf_counter()
            state, metrics = step(state, *given)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
    return {"seconds": float(np.median(times[2:])), "bytes": peak_memory_bytes(), "loss": float(metrics["loss"])}


def visible_gpus() -> int:
    """How many there are, without JAX: the devices are the children's, and this process must not take them."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return len(named.split(","))
    return len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.splitlines())


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
    topology = Topology.parse(f"{given.chip}:{visible_gpus()}")
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
