"""Where a step's device time goes: by the named scopes of the model, and kernel by kernel.

    python benchmarks/profile_by_scope.py        # the distillation of step_speed.py, on a GPU
    python benchmarks/profile_by_scope.py --shape qwen2.5-1.5b-instruct --rows 8 --length 4096 --chunk 2048

Every kernel of a profile is looked up in the compiled program, whose metadata says in which scope it was traced.
Kernels of no scope are what stands between: residual sums, casts of parameters. Bytes are those of a kernel's arrays,
each read or written once; operations are those of matrix products.
"""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

# Kernels of a command buffer are not told apart in a profile.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
from compiled import Program
from shapes import SHAPES
from step_speed import UPDATES, Steps, batch_of

from jaxhybrid.model.config import FULL_ATTENTION, Remat
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.partition import make_mesh

SCOPES = (FULL_ATTENTION, *LINEAR_MIXERS, "mlp", "norm", "head", "loss", "embed", "gather", "optimizer")


def kernels(folder: str) -> Iterator[tuple[str, str, float]]:
    """(instruction, kernel, milliseconds) of everything that ran on a device while the profile was taken."""
    (trace,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                yield str(stats.get("hlo_op", event.name)), event.name, event.duration_ns / 1e6


def where(program: Program, name: str) -> tuple[str, str]:
    """(teacher, forward, again or backward; the scope) of an instruction."""
    if name not in program.instructions:
        return "no turn", "no scope"
    one = program.instructions[name][0]
    return "teacher" if "teacher" in one.path.split("/") else one.turn, one.scope(SCOPES)


def tables(program: Program, ran: list[tuple[str, str, float]], steps: int, longest: int) -> str:
    """Time by scope and turn, and the kernels that take longest."""
    by_scope: Counter[tuple[str, str]] = Counter()
    by_kernel: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for name, kernel, milliseconds in ran:
        by_scope[where(program, name)] += milliseconds / steps
        by_kernel[name, kernel] += milliseconds / steps
        calls[name, kernel] += 1
    lines = []
    for (turn, scope), milliseconds in by_scope.most_common():
        lines.append(
            f"{turn:9} {scope:16} {milliseconds:8.2f} ms a step {100 * milliseconds / by_scope.total():5.1f} %"
        )
    lines += [f"{'all':26} {by_scope.total():8.2f}", ""]
    lines.append(f"{'ms':>8} {'calls':>6} {'MB':>8} {'TB/s':>5} {'GFLOP':>8} {'TFLOP/s':>7}  turn, scope, instruction")
    for (name, kernel), milliseconds in by_kernel.most_common(longest):
        count = calls[name, kernel] / steps
        figures = f"{milliseconds:8.2f} {count:6.0f}"
        path = ""
        if name in program.instructions:
            moved, done = program.bytes_of(name) / 1e6, program.operations_of(name) / 1e9
            each = milliseconds / count  # MB/ms are GB/s
            figures += f" {moved:8.1f} {moved / each / 1e3:5.2f} {done:8.1f} {done / each:7.0f}"
            path = program.instructions[name][0].path.rpartition("body/")[2][-90:]
        lines.append(f"{figures:47}  {' '.join(where(program, name))}, {name} [{kernel[:50]}] {path}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m-instruct", choices=SHAPES)
    parser.add_argument("--stage", default="distill", choices=list(UPDATES))
    parser.add_argument("--mixer", default="gated_deltanet", choices=list(LINEAR_MIXERS))
    parser.add_argument("--remat", default="block", choices=get_args(Remat))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens whose logits are held at once")
    parser.add_argument("--unroll", action="store_true", help="each layer by itself in place of a loop; not score")
    parser.add_argument("--float8-teacher", action="store_true", help="as align.float8_teacher and distill's")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--longest", type=int, default=40, help="kernels to list")
    parser.add_argument("--program", type=Path, metavar="FILE", help="where to leave the compiled program's text")
    given = parser.parse_args()
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        steps = Steps(given.shape, mesh, given.mixer)
        batch = batch_of(steps, mesh, given.rows, given.length, [given.stage])
        flags = {"unroll": given.unroll, "float8_teacher": given.float8_teacher}
        step, state = steps.step(given.stage, given.remat, given.chunk, **flags)
        compiled = step.lower(state, steps.frozen, batch).compile()
        text = compiled.as_text()
        if given.program:
            given.program.write_text(text)
        state, metrics = compiled(state, steps.frozen, batch)
        jax.block_until_ready(metrics)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(given.steps):
                    state, metrics = compiled(state, steps.frozen, batch)
                    jax.block_until_ready(metrics)
            ran = list(kernels(folder))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {given.shape}, {given.stage}, {given.remat}, "
        f"{given.rows} rows of {given.length} tokens"
    )
    print(tables(Program(text), ran, given.steps, given.longest))


if __name__ == "__main__":
    main()
