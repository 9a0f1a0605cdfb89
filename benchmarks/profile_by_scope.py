"""Where a distillation step's device time goes, by the named scopes of the model.

    python benchmarks/profile_by_scope.py        # the step of step_speed.py, on a GPU

Every kernel of a profile is looked up in the compiled program, whose metadata says in which scope it was traced.
Kernels of no scope are what stands between: residual sums, casts of parameters, the optimizer.
"""

import argparse
import os
import re
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

# Kernels of a command buffer are not told apart in a profile.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp
from shapes import shape_of
from step_speed import SOFTMAX_LAYERS, packed_batch

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.stages import DistillConfig
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert

SMOLLM2 = shape_of("smollm2-135m-instruct")
SCOPES = (FULL_ATTENTION, GatedDeltaNetConfig.kind, "mlp", "head", "loss", "embed", "gather", "optimizer")


def scopes_by_instruction(program: str) -> dict[str, str]:
    """Instruction -> the scope in which it was traced, innermost last."""
    found = {}
    for name, path in re.findall(r'%?([\w.-]+) = [^\n]*metadata=\{[^}]*op_name="([^"]*)"', program):
        parts = re.split(r"[/()]", path)
        found[name] = next((part for part in reversed(parts) if part in SCOPES), "no scope")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    teacher = Model(jax.jit(lambda key: random_params(SMOLLM2, key))(jax.random.key(0)), SMOLLM2)
    types = layer_types(SMOLLM2.num_layers, SOFTMAX_LAYERS, GatedDeltaNetConfig.kind)
    student = convert(teacher, types, GatedDeltaNetConfig(), jax.random.key(1))
    optimizer = make_optimizer(DistillConfig(), student.params)
    step = partial(distill_step, config=student.config, optimizer=optimizer, chunk_tokens=8192)
    state, frozen = start(student.params, optimizer), teacher.cast(jnp.bfloat16)
    batch = packed_batch(arguments.rows, arguments.length, SMOLLM2.vocab_size)
    compiled = jax.jit(step).lower(state, frozen, batch).compile()
    scopes = scopes_by_instruction(compiled.as_text())
    jax.block_until_ready(compiled(state, frozen, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(arguments.steps):
                jax.block_until_ready(compiled(state, frozen, batch))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        time: Counter[str] = Counter()
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                for event in line.events:
                    if not line.name.startswith("Stream"):
                        continue
                    instruction = str(dict(event.stats).get("hlo_op", event.name))
                    time[scopes.get(instruction, "no scope")] += event.duration_ns / 1e6 / arguments.steps
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.rows} rows of {arguments.length} tokens")
    for scope, milliseconds in time.most_common():
        print(f"{scope:16} {milliseconds:8.2f} ms a step {100 * milliseconds / time.total():5.1f} %")
    print(f"{'all':16} {time.total():8.2f}")


if __name__ == "__main__":
    main()
