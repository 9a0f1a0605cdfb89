"""Kernels on real chips' compilers, on a machine without a TPU: bundles, VMEM, spills, slots, and ratios to the floors.

    python kernels/benchmarks/tpu_schedule.py --chips v5e v6e --recurrence gated_deltanet kimi_delta --all
    python kernels/benchmarks/tpu_schedule.py --chips v6e --compare-tokamax
    python kernels/benchmarks/tpu_schedule.py --chips v5e --callable my_kernel.py:build

Needs libtpu, no TPU: `make tpu-compiler` puts it beside the environment; otherwise install jax[tpu], or set
TPU_LIBRARY_PATH=/path/to/libtpu.so. Every chip is compiled for in a process of its own. `--callable FILE:NAME` calls
NAME(), which gives (function, arguments as jax.ShapeDtypeStruct).

"bundles" is the number issued over B T H, per token and head: what runs at some grid steps only (`pl.when` on the grid
index) counts that often, and what runs or not for reasons that the listing does not show counts at every step; "of
these uncertain" is the latter. It is a time without waiting, for memory above all: where the ratio to the byte floor is
below one, memory decides. "spills" are fills and spills in the code of every grid step. "matrix units" is how long they
need for the rows they are given, as a share of the bundles; above 100 % the hardware stalls, and that time counts
instead of the bundles in the ratios to the floors (tpu_floors.py).

The directions are the forward of training, the backward, and inference: the forward that keeps nothing.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tpu_dump import DUMP_FLAGS, Program, read_programs
from tpu_floors import DIRECTIONS, RECURRENCES, flops, traffic


class Chip(NamedTuple):
    """A TPU: the topology to ask libtpu for, JAX's name of it, and rows a matrix unit takes in one cycle.

    The rate of rows is what a large plain matmul compiles to: its instructions of 16 bfloat16 rows follow one another
    at 16, 8 or 4 bundles. With the vendor's peak it gives the clock.
    """

    topology: str
    version: str
    rows_per_cycle: int


CHIPS = {
    "v4": Chip("v4:2x2x1", "v4", 1),
    "v5e": Chip("v5e:2x2", "v5e", 1),
    "v5p": Chip("v5p:2x2x1", "v5p", 1),
    "v6e": Chip("v6e:2x2", "v6e", 2),
    "tpu7x": Chip("tpu7x:2x2x1", "7x", 4),
}


class Job(NamedTuple):
    """Something to compile; flops and bytes per token and head are its floors (0: none known)."""

    label: str
    build: object  # () -> (function, arguments)
    units: int  # tokens times heads
    flops: float = 0.0
    bytes: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# What runs in the process of one chip


def our_jobs(options):
    """Our operators for every recurrence, dtype and width asked for; packed and with initial states if asked."""
    import jax
    import jax.numpy as jnp
    from jaxhybrid_kernels import dplr_attention, linear_attention

    B, T, H = options.batch, options.tokens, options.heads
    for name, dtype, K in product(options.recurrence, options.dtype, options.width):
        recurrence, V = RECURRENCES[name], options.value_width or K
        wide, narrow = jax.ShapeDtypeStruct((B, T, H, K), dtype), jax.ShapeDtypeStruct((B, T, H), jnp.float32)
        arrays = dict.fromkeys(recurrence.wide, wide) | {"v": jax.ShapeDtypeStruct((B, T, H, V), dtype)}
        if recurrence.decay:
            channels = (K,) if recurrence.decay == "channel" else ()
            arrays["log_decay"] = jax.ShapeDtypeStruct((B, T, H, *channels), jnp.float32)
        if recurrence.beta:
            arrays["beta"] = narrow
        if options.packed:
            arrays["segment_ids"] = jax.ShapeDtypeStruct((B, T), jnp.int32)
            arrays["initial_state"] = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
        operator = dplr_attention if name == "dplr" else linear_attention

        def run(arrays, name=name, operator=operator):
            norm = {"norm_eps": 1e-6} if options.norms and name != "dplr" else {}
            return operator(**arrays, implementation=options.implementation, **norm)

        built = directions(run, (arrays,))
        for direction in options.directions:
            sizes = (recurrence, K, V, jnp.dtype(dtype).itemsize, direction)
            yield Job(f"{name} {dtype} {K} {direction}", built[direction], B * T * H, flops(*sizes), traffic(*sizes))


def directions(function, arguments):
    """The forward that keeps what the backward needs, the backward from what was kept, and the forward that keeps
    nothing (inference), each as its own program."""
    import jax

    def forward(*arguments):
        return jax.vjp(function, *arguments)

    def backward(pull, gradients):
        return pull(gradients)

    def build_backward():
        results, pull = jax.eval_shape(forward, *arguments)
        return backward, (pull, results)

    return {
        "forward": lambda: (forward, arguments),
        "backward": build_backward,
        "inference": lambda: (function, arguments),
    }


def tokamax_jobs(options):
    """tokamax's Kimi delta attention, arguments [H,B,T,K] as it wants them."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.kda.api import kimi_delta_attention

    B, T, H, K = options.batch, options.tokens, options.heads, options.width[0]

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    wide = shape(H, B, T, K)
    arguments = (wide, wide, wide, shape(H, B, T, K, dtype=jnp.float32), shape(H, B, T, dtype=jnp.float32))

    def run(*arguments):
        return kimi_delta_attention(*arguments, implementation="mosaic")[0]

    built = directions(run, arguments)
    for direction in options.directions:
        sizes = (RECURRENCES["kimi_delta"], K, K, 2, direction)
        yield Job(f"tokamax kimi_delta {direction}", built[direction], B * T * H, flops(*sizes), traffic(*sizes))


def matmul_job(_options):
    """A plain matmul of values in VMEM, for the rate at which this compiler feeds the matrix units."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    M, K, N, steps = 512, 2048, 512, 8

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32).astype(out_ref.dtype)

    def matmul(x, w):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((steps * M, N), x.dtype),
            grid=(steps,),
            in_specs=[pl.BlockSpec((M, K), lambda i: (i, 0)), pl.BlockSpec((K, N), lambda i: (0, 0))],
            out_specs=pl.BlockSpec((M, N), lambda i: (i, 0)),
            name="plain_matmul",
        )(x, w)

    arguments = tuple(jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in ((steps * M, K), (K, N)))
    yield Job("plain matmul, per row", lambda: (matmul, arguments), steps * M, 2.0 * K * N)


def callable_job(options):
    file, name = options.callable.rsplit(":", 1)
    if file.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(file)
    yield Job(name, getattr(module, name), options.batch * options.tokens * options.heads)


def compile_for(chip, options, folder):
    """Compiles every job for one chip; the dump folder is emptied after each."""
    import contextlib

    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,)), PartitionSpec())
    described = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=described, axis_types=(AxisType.Auto,))
    version = next(v for v in pltpu.ChipVersion if str(v) == CHIPS[chip].version)
    info = pltpu.get_tpu_info_for_chip(version, 1)
    flops_per_cycle = info.num_mxus * info.mxu_column_size**2 * 2 * CHIPS[chip].rows_per_cycle
    clock = info.bf16_ops_per_second / flops_per_cycle
    machine = {
        "clock_GHz": clock / 1e9,
        "flops_per_cycle": flops_per_cycle,
        "bytes_per_cycle": info.mem_bw_bytes_per_second / clock,
        "vmem": info.vmem_capacity_bytes,
        "rows_per_cycle": info.num_mxus * CHIPS[chip].rows_per_cycle,
    }
    jobs = list(matmul_job(options))
    peer = contextlib.nullcontext()
    if options.callable:
        jobs += callable_job(options)
    elif options.recurrence:
        jobs += our_jobs(options)
    if options.compare_tokamax and chip in ("v6e", "tpu7x"):
        import tokamax

        peer = tokamax.config.cross_compile(True)
        jobs += tokamax_jobs(options)
    rows = []
    for job in jobs:
        with peer, jax.sharding.use_abstract_mesh(mesh):
            try:
                function, arguments = job.build()
                placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
                jax.jit(function).lower(*placed).compile()
                rows.append(summary(job, read_programs(folder), machine))
            except Exception as error:  # another kernel's figures are still wanted
                if not options.keep_going:
                    raise
                rows.append({"job": job.label, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        if not options.keep:
            for path in folder.iterdir():
                path.unlink()
    return {"machine": machine, "rows": rows}


def summary(job: Job, programs: list[Program], machine: dict) -> dict:
    """One row for a job: its kernels, and the sum over everything it runs, per token and head."""
    kernels = [program for program in programs if program.is_kernel]
    bundles = sum(program.bundles for program in programs)
    matrix = sum(program.matmul_rows for program in programs) / machine["rows_per_cycle"]
    cycles = max(bundles, matrix) / job.units
    arithmetic, traffic = job.flops / machine["flops_per_cycle"], job.bytes / machine["bytes_per_cycle"]
    return {
        "job": job.label,
        "bundles": bundles / job.units,
        "kernel_bundles": sum(program.bundles for program in kernels) / job.units,
        "matrix_share": matrix / bundles,
        "arithmetic_floor": arithmetic,
        "byte_floor": traffic,
        "to_arithmetic_floor": cycles / arithmetic if arithmetic else None,
        "to_byte_floor": cycles / traffic if traffic else None,
        "uncertain": sum(program.uncertain for program in programs) / job.units,
        "spills": sum(program.spills for program in kernels),
        "seldom_spills": sum(program.seldom_spills for program in kernels),
        "vmem": max((program.vmem for program in kernels), default=0),
        "kernels": [
            program.as_dict()
            | {"per_unit": program.bundles / job.units, "uncertain_per_unit": program.uncertain / job.units}
            for program in kernels
        ],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The process that the user starts


def find_libtpu():
    """TPU_LIBRARY_PATH, what `make tpu-compiler` installed, or the installed package; None without any."""
    beside = Path(sys.prefix) / "tpu-compiler/libtpu/libtpu.so"
    package = importlib.util.find_spec("libtpu")
    installed = Path(package.origin).parent / "libtpu.so" if package and package.origin else None
    paths = (os.environ.get("TPU_LIBRARY_PATH"), beside, installed)
    return next((str(path) for path in paths if path and Path(path).exists()), None)


def compiler_environment(folder):
    """For a process that compiles for TPUs without one and dumps into the folder."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": find_libtpu(),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": DUMP_FLAGS.format(folder=folder),
    }


def compile_in_process(chip, arguments):
    """Starts this file again for one chip: libtpu reads its flags once, before JAX starts."""
    with tempfile.TemporaryDirectory(prefix="tpu-schedule-") as folder:
        command = [sys.executable, __file__, *arguments, "--worker", chip, folder]
        done = subprocess.run(command, env=compiler_environment(folder), capture_output=True, text=True)
    if done.returncode:
        lines = [line[:400] for line in done.stderr.strip().splitlines()[-12:]]
        raise SystemExit(f"compiling for {chip} failed:\n" + "\n".join(lines))
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_chip(chip, result):
    machine = result["machine"]
    print(
        f"\n{chip}: clock {machine['clock_GHz']:.2f} GHz (peak bfloat16 rate of jax's TpuInfo over"
        f" {machine['flops_per_cycle']:,} flop per cycle), {machine['bytes_per_cycle']:.0f} bytes per cycle"
    )
    print(
        f"{'':44} {'bundles':>8} {'of these uncertain':>18} {'steps':>6} {'per step':>9} {'VMEM MiB':>9} {'spills':>7}"
        f" {'and seldom':>10} {'matmuls':>9} {'pushes':>9} {'matrix units':>13} {'nearest to full':>17} {'x flops':>8}"
        f" {'x bytes':>8}"
    )
    for row in result["rows"]:
        if "error" in row:
            print(f"{row['job']:44} {row['error']}")
            continue
        ratios = [f"{row[key]:>8.2f}" if row[key] else f"{'-':>8}" for key in ("to_arithmetic_floor", "to_byte_floor")]
        print(
            f"{row['job']:44} {row['bundles']:>8.2f} {row['uncertain']:>18.2f} {'':>16} {row['vmem'] / 2**20:>9.1f}"
            f" {row['spills']:>7} {row['seldom_spills']:>10} {'':>19} {row['matrix_share']:>13.0%} {'':>17}"
            f" {' '.join(ratios)}"
        )
        for kernel in row["kernels"]:
            slot, share = kernel["bound"]
            unknown = "" if kernel["loops_known"] else "  (a loop's trips are unknown: counted once)"
            print(
                f"  {kernel['name'][:42]:42} {kernel['per_unit']:>8.2f}"
                f" {kernel['uncertain_per_unit']:>18.2f} {kernel['grid_steps']:>6}"
                f" {kernel['step_bundles']:>9.0f} {kernel['vmem'] / 2**20:>9.1f}"
                f" {kernel['spills']:>7} {kernel['seldom_spills']:>10} {kernel['matmuls']:>9} {kernel['pushes']:>9}"
                f" {kernel['matmul_rows'] / machine['rows_per_cycle'] / kernel['bundles']:>13.0%}"
                f" {slot + f' {share:.0%}':>17}{unknown}"
            )
        around = row["bundles"] - row["kernel_bundles"]
        if row["kernels"] and around > 0.005:
            print(f"  {'XLA around the kernels':42} {around:>8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=["v5e", "v6e"])
    parser.add_argument("--recurrence", nargs="*", choices=RECURRENCES, default=list(RECURRENCES))
    parser.add_argument("--implementation", default="pallas_tpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, nargs="+", default=[128], help="of a key head")
    parser.add_argument("--value-width", type=int, help="of a value head, by default that of a key head")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--packed", action="store_true", help="with segment ids and initial states")
    parser.add_argument("--norms", action="store_true", help="with queries and keys divided by their L2 norms")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=["forward"])
    parser.add_argument("--all", action="store_true", help="all directions")
    parser.add_argument("--callable", help="FILE.py:NAME or MODULE:NAME instead of our operators")
    parser.add_argument("--compare-tokamax", action="store_true", help="also tokamax's Kimi delta kernels (v6e, tpu7x)")
    parser.add_argument("--keep-going", action="store_true", help="report what does not compile, do not stop there")
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.all:
        options.directions = DIRECTIONS
    if options.worker:
        chip, folder = options.worker
        print(json.dumps(compile_for(chip, options, Path(folder))))
        return
    if not find_libtpu():
        raise SystemExit("libtpu is not installed: run `make tpu-compiler`, or set TPU_LIBRARY_PATH to a libtpu.so.")
    if options.compare_tokamax and importlib.util.find_spec("tokamax") is None:
        raise SystemExit("tokamax is not installed: pip install tokamax==0.0.17")
    results = {}
    for chip in options.chips:
        results[chip] = compile_in_process(chip, sys.argv[1:])
        if not options.json:
            print_chip(chip, results[chip])
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
