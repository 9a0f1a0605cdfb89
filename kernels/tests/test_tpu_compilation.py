"""Every TPU kernel, forward and backward, compiled ahead of time for five chips, on a machine without one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCHEDULE = Path(__file__).parents[1] / "benchmarks/tpu_schedule.py"
CHIPS = ["v4", "v5e", "v5p", "v6e", "tpu7x"]


@pytest.fixture(scope="module")
def tpu_schedule():
    sys.path.insert(0, str(SCHEDULE.parent))
    try:
        spec = importlib.util.spec_from_file_location(SCHEDULE.stem, SCHEDULE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    if not module.find_libtpu():
        pytest.skip("libtpu is not here: `make tpu-compiler`")
    return module


def compile_all(tpu_schedule, chip, *arguments):
    """What the command reports about every kernel, in the order of the jobs. The forward is that of training, which
    does all that inference does."""
    directions = ("--directions", "forward", "backward")
    command = ("--chips", chip, *directions, "--keep-going", "--tokens", "256", *arguments)
    result = tpu_schedule.compile_in_process(chip, command)
    machine, rows = result["machine"], result["rows"][1:]  # the first is a plain matmul
    rows = [row for row in rows if "pallas_tpu takes at most" not in row.get("error", "")]  # refused by name
    failures = [f"{row['job']}: {row['error']}" for row in rows if "error" in row]
    assert not failures, "\n".join(failures)
    for row in rows:
        kernels = row["kernels"]
        assert kernels, f"{row['job']} runs no kernel"
        assert all(kernel["grid_steps"] >= 2 for kernel in kernels), row["job"]
        assert 0 < row["vmem"] < machine["vmem"], row["job"]
    return rows


@pytest.mark.parametrize("chip", CHIPS)
def test_every_recurrence_compiles(tpu_schedule, chip):
    compile_all(tpu_schedule, chip, "--heads", "2")


@pytest.mark.parametrize("chip", ["v4", *(pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS[1:])])
def test_packed_float32_compiles(tpu_schedule, chip):
    """The kernels that need most VMEM, on the chip that has least: all heads, float32, segments, states and norms."""
    sizes = ("--heads", "8", "--dtype", "float32", "--packed", "--norms")
    compile_all(tpu_schedule, chip, *sizes, "--recurrence", "gated_deltanet", "kimi_delta", "dplr")


@pytest.mark.parametrize("chip", CHIPS)
def test_short_convolution_compiles(tpu_schedule, chip):
    (row,) = compile_all(tpu_schedule, chip, "--callable", f"{__file__}:short_convolution_and_gradients")
    assert {kernel["name"] for kernel in row["kernels"]} == {"short_convolution_forward", "short_convolution_backward"}


def short_convolution_and_gradients():
    """The function and its arguments, for `--callable`."""
    import jax
    import jax.numpy as jnp
    from jaxhybrid_kernels import short_convolution

    def run(x, weight, segment_ids, state, gradients):
        def convolve(x, weight, state):
            return short_convolution(x, weight, segment_ids, state, "pallas_tpu")

        results, pull = jax.vjp(convolve, x, weight, state)
        return results, pull(gradients)

    x, state = (jax.ShapeDtypeStruct((1, rows, 512), jnp.bfloat16) for rows in (1030, 3))
    weight, ids = jax.ShapeDtypeStruct((4, 512), jnp.float32), jax.ShapeDtypeStruct((1, 1030), jnp.int32)
    return run, (x, weight, ids, state, (x, state))


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_seldom_code_counts_as_often_as_it_runs(tpu_schedule, chip):
    """128 registers copied at the first of 8 grid steps, and again at steps that data decides."""
    (row,) = compile_all(tpu_schedule, chip, "--callable", f"{__file__}:copy_seldom")
    (kernel,) = row["kernels"]
    assert kernel["grid_steps"] == 8
    seldom, uncertain = kernel["seldom_bundles"], kernel["uncertain"]
    assert 56 <= seldom <= 132  # one or two stores a bundle, some in the bundles after a branch
    assert 8 * 56 <= uncertain <= 8 * 132
    assert kernel["bundles"] - seldom - uncertain < 8 * 110  # two copies more a step would be 128 to 256


def copy_seldom():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(steps_ref, x_ref, out_ref, first_ref, second_ref):
        @pl.when(pl.program_id(0) == 0)
        def _():
            first_ref[...] = x_ref[...]

        @pl.when(steps_ref[pl.program_id(0)] == 1)
        def _():
            second_ref[...] = x_ref[...]

        rows = pl.ds(pl.multiple_of(steps_ref[0], 8), 8)  # any of them: the compiler keeps all copies
        out_ref[...] = first_ref[rows] + second_ref[rows]

    large = (1024, 128)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((64, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(8,),
            in_specs=[pl.BlockSpec(large, lambda i, steps: (0, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, steps: (i, 0)),
            scratch_shapes=[pltpu.VMEM(large, "float32")] * 2,
        ),
        name="copy_seldom",
    ), (jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct(large, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_widths_compile(tpu_schedule, chip, width):
    sizes = ("--heads", "8", "--width", str(width), "--dtype", "bfloat16", "float32")
    compile_all(tpu_schedule, chip, *sizes, "--packed", "--norms", "--all")


def test_sharded_over_four_chips(tpu_schedule, tmp_path):
    """Inside jax.shard_map, with manual axes checked: batches on four chips."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=tpu_schedule.compiler_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["linear_attention_backward", "linear_attention_forward"]


def compile_sharded():
    """Prints the names of the kernels in a sharded step for a v5e slice."""
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from jaxhybrid_kernels import linear_attention

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    def loss(q, k, v, log_decay, beta):
        out, state = linear_attention(q, k, v, log_decay, beta, implementation="pallas_tpu")
        return jax.lax.psum(jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state), "data")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=P("data"), out_specs=P())
    wide, narrow = (4, 256, 2, 128), (4, 256, 2)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data")))
        for shape, dtype in [(wide, jnp.bfloat16)] * 3 + [(narrow, jnp.float32)] * 2
    ]
    compiled = jax.jit(jax.grad(sharded, argnums=(0, 1, 2, 3, 4))).lower(*arguments).compile()
    print(json.dumps(sorted(set(re.findall(r"linear_attention_(?:forward|backward)", compiled.as_text())))))


if __name__ == "__main__":
    compile_sharded()
