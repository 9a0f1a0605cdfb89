"""What a step moves and multiplies on an H100, kernel by kernel, as XLA compiles it without one.

    python benchmarks/compiled_step.py align --shape qwen2.5-1.5b-instruct --rows 8 --length 4096
    python benchmarks/compiled_step.py distill --rows 8 --length 4096 --chunk 2048 --remat mlp --unroll --float8-teacher

A line has kernels that are alike: the least time of all of them together, their count in a step, the bytes of one,
where they were traced. The least time is that of their bytes or products, at --bandwidth and --rate: what a kernel
really takes is for a card to say (profile_by_scope.py), but a pass over memory that nobody needs is seen here. Nothing
is tuned without a card, so products are by cuBLAS where a card may choose others.

Needs the extra cuda13 (JAX's CUDA plugin and assembler), and no GPU. Half a minute; with --unroll some minutes.
"""

import argparse
import os
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

os.environ["JAX_PLATFORMS"] = "cpu"
# The limit beyond which XLA computes things again is 80 % of an absent card by this factor; with 113 it is that of a
# process with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false --xla_gpu_memory_limit_slop_factor=113"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels/benchmarks"))

import jax
import jax.numpy as jnp
from compiled import FREE, Program
from gpu_resources import absent_h100, find_assembler
from jax.sharding import SingleDeviceSharding
from profile_by_scope import SCOPES
from shapes import SHAPES, quarter, shape_of

from jaxhybrid.model.config import Remat
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.selection.methods import layer_types
from jaxhybrid.settings.stages import DistillConfig
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert

WHILE = re.compile(r' while\(.*body=%?([\w.-]+).*"known_trip_count":\{"n":"(\d+)"')
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
NO_KERNELS = FREE | {"while", "conditional", "call", "copy-start", "async-start"}


class Alike(NamedTuple):
    name: str
    turn: str
    scope: str
    megabytes: int


def compiled_text(options: argparse.Namespace) -> str:
    """Of the step as a run compiles it, for a student with a quarter of its layers softmax."""
    shape, mixer = shape_of(options.shape), LINEAR_MIXERS[options.mixer].Config()
    kept = quarter(shape.num_layers) if options.stage == "distill" else ()
    types = layer_types(shape.num_layers, kept, options.mixer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = jax.eval_shape(lambda key: Model(random_params(shape, key), shape).cast(jnp.bfloat16), key)
    student = jax.eval_shape(lambda model, key: convert(model, types, mixer, key), frozen, key)
    params = linear_mixers(student.params) if options.stage == "align" else student.params
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    optimizer = make_optimizer(DistillConfig(mixer_learning_rate=1e-3), params)
    state = jax.eval_shape(partial(start, optimizer=optimizer), params)
    rows = jax.ShapeDtypeStruct((options.rows, options.length), jnp.int32)
    given: dict[str, Any] = {"config": student.config, "optimizer": optimizer, "unroll": options.unroll}
    given["float8_teacher"] = options.float8_teacher
    if options.stage == "distill":
        given |= {"remat": options.remat, "chunk_tokens": options.chunk}
    step = partial({"align": align_step, "distill": distill_step}[options.stage], **given)
    device, mesh = absent_h100()
    here = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        (state, frozen, {"tokens": rows, "segment_ids": rows}),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.compile().as_text()


def repeats(text: str) -> dict[str, int]:
    """How often each computation that is a loop's body is carried out in a step."""
    inside, loops = "", {}
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            inside = found[1]
        elif found := WHILE.search(line):
            loops[found[1]] = inside, int(found[2])

    def times(name: str) -> int:
        around, count = loops.get(name, ("", 1))
        return count * times(around) if around else count

    return {name: times(name) for name in loops}


def kernels(text: str, bandwidth: float, rate: float) -> dict[Alike, tuple[float, int]]:
    """(milliseconds at least, count) in a step of those that are alike."""
    program, counts = Program(text), repeats(text)
    found: dict[Alike, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, inside in program.computations.items():
        if name.startswith(("fused", "dynamic", "wrapped", "region")) and name not in counts:
            continue  # parts of kernels
        for own, one in inside.items():
            if one.operation in NO_KERNELS or one.operation.endswith("-done"):
                continue
            moved, done = program.bytes_of(own), program.operations_of(own)
            alike = Alike(
                one.target or re.sub(r"[.\d]+$", "", own),
                "teacher" if "/teacher/" in one.path else one.turn, one.scope(SCOPES), round(moved / 1e6),
            )  # fmt: skip
            times = counts.get(name, 1)
            least, count = found[alike]
            found[alike] = least + 1e3 * times * max(moved / bandwidth, done / rate), count + times
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["align", "distill"])
    parser.add_argument("--shape", default="qwen2.5-1.5b-instruct", choices=SHAPES)
    parser.add_argument("--mixer", default="gated_deltanet", choices=list(LINEAR_MIXERS))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens whose logits are held at once")
    parser.add_argument("--remat", default="block", choices=get_args(Remat), help="of distill")
    parser.add_argument("--unroll", action="store_true", help="each layer by itself in place of a loop")
    parser.add_argument("--float8-teacher", action="store_true", help="as align.float8_teacher and distill's")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second")
    parser.add_argument("--rate", type=float, default=790e12, help="operations of products a second")
    parser.add_argument("--longest", type=int, default=60, help="lines to list")
    parser.add_argument("--program", type=Path, metavar="FILE", help="where to leave the compiled program's text")
    options = parser.parse_args()
    find_assembler()
    text = compiled_text(options)
    if options.program:
        options.program.write_text(text)
    found = kernels(text, options.bandwidth, options.rate)
    asked = f"{options.stage}, {options.shape}, {options.rows} rows of {options.length} tokens"
    print(f"{asked}, jax {jax.__version__}: {sum(least for least, _ in found.values()):.1f} ms at least, of them")
    for alike, (least, count) in sorted(found.items(), key=lambda item: -item[1][0])[: options.longest]:
        where = f"{alike.turn:9} {alike.scope:16} {alike.name}"
        print(f"{least:8.2f} ms {count:5} x {alike.megabytes:6} MB  {where}")


if __name__ == "__main__":
    main()
