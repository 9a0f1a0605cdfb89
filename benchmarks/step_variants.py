"""Variants of a step side by side on a GPU, each in a process of its own: remat, chunks of the loss, XLA flags.

    python benchmarks/step_variants.py                                # the distillation of the 1.5B shape, 8 x 4096
    python benchmarks/step_variants.py block mlp mlp+slices-in-products --seconds 160
    python benchmarks/step_variants.py --rows 1 --length 32768 block

A variant is one or several changes of the default (`--list` names them), joined by a plus. A process has its own
compiler's flags and its own peak of memory. What does not fit into --seconds is left out, and the table says so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

from shapes import SHAPES


@dataclass(frozen=True)
class Variant:
    stage: str = "distill"
    remat: str = "block"
    chunk: int = 2048
    unroll: bool = False
    float8_teacher: bool = False
    flags: tuple[str, ...] = ()

    def __add__(self, change: dict[str, Any]) -> "Variant":
        return replace(self, **change | {"flags": (*self.flags, *change.get("flags", ()))})


def xla(*flags: str) -> dict[str, Any]:
    return {"flags": tuple(f"--xla_gpu_{flag}" for flag in flags)}


CHANGES: dict[str, dict[str, Any]] = {
    "block": {},
    "mlp": {"remat": "mlp"},
    "dots": {"remat": "dots"},
    "align": {"stage": "align"},
    "unroll": {"unroll": True},
    "float8": {"float8_teacher": True},
    "chunk-1024": {"chunk": 1024},
    "chunk-4096": {"chunk": 4096},
    "slices-in-products": xla("enable_dynamic_slice_fusion=true"),
    "conditions-in-graphs": xla("enable_command_buffer=+CONDITIONAL,+WHILE"),
    "no-command-buffer": xla("enable_command_buffer="),
    "double-buffered-loops": xla("enable_while_loop_double_buffering=true"),
    "no-triton-gemm": xla("enable_triton_gemm=false"),
    "fusion-autotuner": xla("experimental_enable_fusion_autotuner=true"),
    "cublaslt": xla("enable_cublaslt=true"),
}


def variant(names: str) -> Variant:
    """Of changes joined by `+`. Raises KeyError for one that is not there."""
    return reduce(Variant.__add__, (CHANGES[name] for name in names.split("+")), Variant())


def measured(variant: Variant, shape: str, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Of a step in this process: milliseconds, and its peak of memory in GiB."""
    import jax
    from step_speed import Steps, packed_batch, seconds_per_step

    from jaxhybrid.measure import peak_memory_bytes
    from jaxhybrid.model.partition import batch_sharding, make_mesh

    mesh = make_mesh()
    with jax.set_mesh(mesh):
        made = Steps(shape, mesh, "gated_deltanet")
        batch = jax.device_put(packed_batch(rows, length, made.shape.vocab_size), batch_sharding(mesh))
        given = {"unroll": variant.unroll, "float8_teacher": variant.float8_teacher}
        step = made.step(variant.stage, variant.remat, variant.chunk, **given)
        seconds = seconds_per_step(*step, made.frozen, batch, steps)
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    return {"ms": 1e3 * seconds, "gib": peak_memory_bytes() / 2**30, "device": device}


def in_own_process(variant: Variant, given: argparse.Namespace, limit: float) -> dict[str, Any] | str:
    """The figures, or why there are none."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(variant)), "--shape", given.shape]
    command += [f"--{name}={getattr(given, name)}" for name in ("rows", "length", "steps")]
    flags = " ".join([os.environ.get("XLA_FLAGS", ""), *variant.flags])
    try:
        done = subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return f"failed: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1][:200]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="CHANGE[+CHANGE]", help="default: each change")
    parser.add_argument("--shape", default="qwen2.5-1.5b-instruct", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=600, help="in which all of it must end")
    parser.add_argument("--list", action="store_true", help="name the changes and end")
    parser.add_argument("--measure", metavar="JSON", help="one variant, in this process")
    given = parser.parse_args()
    if given.measure:
        own = Variant(**json.loads(given.measure))
        print(json.dumps(measured(own, given.shape, given.rows, given.length, given.steps)))
        return
    if given.list:
        print("\n".join(f"{name:24} {change}" for name, change in CHANGES.items()))
        return
    names = given.variants or list(CHANGES)
    if unknown := {name for names in names for name in names.split("+")} - CHANGES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such change; there are {', '.join(CHANGES)}.")
    ends, tokens = time.monotonic() + given.seconds, given.rows * given.length
    print(f"{given.shape}, {given.rows} x {given.length}\n")
    print("| variant | ms | tokens/s | peak GiB | |\n|---|---|---|---|---|")
    for name in names:
        left = ends - time.monotonic()
        found = in_own_process(variant(name), given, left) if left > 0 else "no time left"
        if isinstance(found, str):
            print(f"| {name} | | | | {found} |", flush=True)
            continue
        ms = found["ms"]
        print(f"| {name} | {ms:,.0f} | {1e3 * tokens / ms:,.0f} | {found['gib']:.1f} | {found['device']} |", flush=True)


if __name__ == "__main__":
    main()
