"""Registers, spills, shared memory and instructions of the Hopper kernels as compiled, with a GPU or without.

    python kernels/benchmarks/gpu_resources.py                      # gated delta rule, 128 channels
    python kernels/benchmarks/gpu_resources.py --recurrence kimi_delta --shape 1,32768,16,128
    python kernels/benchmarks/gpu_resources.py --attention 8,4096,12,2,128

Needs JAX's CUDA plugin (`jax[cuda13]`), which brings the assembler. Spills are bytes a thread stores; "serialised" says
that the assembler put waits between products that were to overlap (its warning C7512).
"""

import argparse
import os
import re
import site
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As XLA describes an H100 when it compiles for one that is not there.
H100 = """gpu_device_info {
 threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
 cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536
 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
 device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "13.0.0"
 compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def set_up(dump: str) -> None:
    """Before JAX starts: what the compiler is to write down, and where its tools are."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = dump
    for what in ("PTX", "PTXAS", "RESOURCES", "SASS"):
        os.environ[f"MOSAIC_GPU_DUMP_{what}"] = "1"
    find_assembler()


def find_assembler() -> None:
    """That of nvidia-cuda-nvcc, before JAX compiles the first program."""
    for folder in site.getsitepackages():
        cuda = Path(folder) / "nvidia/cu13"
        if (cuda / "bin").exists():
            os.environ["PATH"] = f"{cuda}/bin:{os.environ['PATH']}"
            os.environ["CUDA_ROOT"] = os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(cuda)
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={cuda}"


def absent_h100() -> tuple[Any, Any]:
    """(the device, an abstract mesh in which programs are traced for it) to compile for."""
    from jax.experimental import topologies

    description = {"platform": "cuda", "target_config": H100, "topology": "1x1x1"}
    device = topologies.get_topology_desc("h100", **description).devices[0]
    return device, mesh_of(device.device_kind)


def mesh_of(kind: str) -> Any:
    from jax.sharding import AbstractDevice, AbstractMesh

    described = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    return AbstractMesh((), (), abstract_device=described)


def read_dump(folder: Path) -> str | None:
    """One line on the newest kernel in the folder, None if it has none; empties it."""
    texts = {path.suffix: path.read_text(errors="replace") for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    if ".ptxas" not in texts:
        return None
    assembler = texts[".ptxas"]
    registers = re.search(r"Used (\d+) registers", assembler)
    spills = re.search(r"(\d+) bytes spill stores", assembler)
    shared = re.search(r"smem_scratch_bytes=(\d+)", texts[".txt"])
    instructions = sum(bool(re.search(r"/\*[0-9a-f]{4,5}\*/", line)) for line in texts[".sass_ctrl"].splitlines())
    if registers is None or spills is None or shared is None:
        raise ValueError(f"the assembler's report has another form: {assembler[:300]}")
    return (
        f"{registers[1]:>3} registers, {spills[1]:>3} bytes spilled, {int(shared[1]) / 1024:>5.1f} KiB shared,"
        f" {instructions:>5} instructions" + (", serialised" if "C7512" in assembler else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recurrence", default="gated_deltanet")
    parser.add_argument("--shape", default="8,4096,16,128", metavar="B,T,H,width")
    parser.add_argument("--attention", metavar="B,T,H,G,width", help="softmax attention instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-resources-") as dump:
        set_up(dump)
        name, shape = ("softmax", args.attention) if args.attention else (args.recurrence, args.shape)
        report(name, [int(size) for size in shape.split(",")], Path(dump))


def attention_parts(show: Callable[..., Any], B: int, T: int, H: int, G: int, width: int) -> None:
    """The kernels of the forward pass and of the gradients."""
    import jax
    import jax.numpy as jnp
    from jaxhybrid_kernels.gpu import softmax_attention as module
    from jaxhybrid_kernels.gpu.attention_plan import ROWS
    from jaxhybrid_kernels.gpu.block_ranges import ENTRIES

    q, k = (jax.ShapeDtypeStruct((B, T, heads, width), jnp.bfloat16) for heads in (H, G))
    by_query = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    starts = jax.ShapeDtypeStruct((B, T), jnp.int32)
    plan = module.make_plan(q, k)

    def ranges(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, T // rows, ENTRIES), jnp.int32)

    operands = q, k, k, q, by_query, by_query, starts
    show("forward", module.forward_kernel(plan), q, k, k, starts, ranges(plan.rows))
    show("of queries", module.query_gradient_kernel(plan), *operands, ranges(plan.rows))
    show("of keys", module.key_gradients_kernel(plan), *operands, ranges(ROWS))


def report(recurrence: str, shape: list[int], dump: Path) -> None:
    import jax
    from gpu_parts import parts
    from jax.sharding import SingleDeviceSharding

    if jax.default_backend() == "gpu":
        device = jax.devices()[0]
        mesh = mesh_of(device.device_kind)
    else:
        device, mesh = absent_h100()
    print(f"{device.device_kind}, jax {jax.__version__}, {recurrence}, {','.join(map(str, shape))}")

    def show(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), arguments
        )
        jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
        if (line := read_dump(dump)) is not None:
            print(f"{name:13} {line}", flush=True)
        return jax.eval_shape(function, *arguments)

    with jax.sharding.use_abstract_mesh(mesh):
        if recurrence == "softmax":
            attention_parts(show, *shape)
        else:
            jax.eval_shape(lambda: parts(show, *shape, recurrence))


if __name__ == "__main__":
    main()
