"""Variants of a step side by side on a GPU, each in a process of its own: remat, chunks of the loss, XLA flags.

    python benchmarks/step_variants.py                                # the distillation of the 1.5B shape, 8 x 4096
    python benchmarks/step_variants.py block mlp --seconds 120
    python benchmarks/step_variants.py --rows 1 --length 32768 block  # `--list` names the variants

A process has its own compiler's flags and its own peak of memory. What does not fit into --seconds is left out, and the
table says so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from shapes import SHAPES

ROWS, LENGTH, CHUNK = 8, 4096, 2048


@dataclass(frozen=True)
class Variant:
    remat: str = "block"
    chunk: int = CHUNK
    flags: str = ""
    stage: str = "distill"


VARIANTS = {
    "block": Variant(),
    "mlp": Variant("mlp"),
    "dots": Variant("dots"),
    "align": Variant(stage="align"),
    "chunk-1024": Variant(chunk=1024),
    "chunk-4096": Variant(chunk=4096),
    "no-triton-gemm": Variant(flags="--xla_gpu_enable_triton_gemm=false"),
    "conditions-in-graphs": Variant(flags="--xla_gpu_enable_command_buffer=+CONDITIONAL,+WHILE"),
    "no-command-buffer": Variant(flags="--xla_gpu_enable_command_buffer="),
    "double-buffered-loops": Variant(flags="--xla_gpu_enable_while_loop_double_buffering=true"),
    "slices-in-products": Variant(flags="--xla_gpu_enable_dynamic_slice_fusion=true"),
    "fusion-autotuner": Variant(flags="--xla_gpu_experimental_enable_fusion_autotuner=true"),
    "same-shape-fusion": Variant(flags="--xla_gpu_experimental_enable_same_shape_multi_output_fusion=true"),
    "cublaslt": Variant(flags="--xla_gpu_enable_cublaslt=true"),
}


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
        seconds = seconds_per_step(*made.step(variant.stage, variant.remat, variant.chunk), made.frozen, batch, steps)
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    return {"ms": 1e3 * seconds, "gib": peak_memory_bytes() / 2**30, "device": device}


def in_own_process(variant: Variant, given: argparse.Namespace, limit: float) -> dict[str, Any] | str:
    """The figures, or why there are none."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(variant)), "--shape", given.shape]
    command += [f"--{name}={getattr(given, name)}" for name in ("rows", "length", "steps")]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {variant.flags}"
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
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="default: all, in their order")
    parser.add_argument("--shape", default="qwen2.5-1.5b-instruct", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=600, help="in which all of it must end")
    parser.add_argument("--list", action="store_true", help="name the variants and end")
    parser.add_argument("--measure", metavar="JSON", help="one variant, in this process")
    given = parser.parse_args()
    if given.measure:
        variant = Variant(**json.loads(given.measure))
        print(json.dumps(measured(variant, given.shape, given.rows, given.length, given.steps)))
        return
    if given.list:
        print("\n".join(f"{name:24} {variant}" for name, variant in VARIANTS.items()))
        return
    if unknown := [name for name in given.variants if name not in VARIANTS]:
        parser.error(f"{', '.join(unknown)}: no such variant; there are {', '.join(VARIANTS)}.")
    ends, tokens = time.monotonic() + given.seconds, given.rows * given.length
    print(f"{given.shape}, {given.rows} x {given.length}\n")
    print("| variant | ms | tokens/s | peak GiB | |\n|---|---|---|---|---|")
    for name in given.variants or VARIANTS:
        left = ends - time.monotonic()
        found = in_own_process(VARIANTS[name], given, left) if left > 0 else "no time left"
        if isinstance(found, str):
            print(f"| {name} | | | | {found} |", flush=True)
            continue
        ms = found["ms"]
        print(f"| {name} | {ms:,.0f} | {1e3 * tokens / ms:,.0f} | {found['gib']:.1f} | {found['device']} |", flush=True)


if __name__ == "__main__":
    main()
