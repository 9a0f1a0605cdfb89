"""Does the compiler keep a kernel's division of registers between warpgroups? On a Hopper GPU, with jax[cuda13] alone:

    python setmaxnreg.py

A loader (24 registers a thread) and two consumers (240 each) whose float32 accumulators take 192. Compiled whole, none
is spilled. As code to be linked it may not shift registers: all have 168, and accumulators go through local memory.
"""

import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

STEPS, BLOCKS = 2000, 132
TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def smem(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=TILES)


def decayed_sum(total, left, right):
    """total / 2 + left right: an accumulator that is in registers between products."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, left, right))(plgpu.ACC.init(total * 0.5))


def body(a, b, c, wide, narrow, a_s, b_s, c_s, wide_s, narrow_s, loaded):
    thread, block = lax.axis_index("warpgroup"), lax.axis_index("block")

    @pl.when(thread == 2)
    def loader():
        plgpu.set_max_registers(24, action="decrease")
        for source, target in ((a, a_s), (b, b_s), (c, c_s)):
            plgpu.copy_gmem_to_smem(source, target, loaded)

    @pl.when(thread < 2)
    def consumer():
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(loaded)
        start = [plgpu.layout_cast(jnp.zeros((64, n), jnp.float32), plgpu.Layout.WGMMA) for n in (256, 128)]

        def step(_, totals):
            return [decayed_sum(total, a_s, right) for total, right in zip(totals, (b_s, c_s))]

        sums = lax.fori_loop(0, STEPS, step, start)
        for value, shared, out in zip(sums, (wide_s, narrow_s), (wide, narrow)):
            shared[thread] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.at[thread], out.at[block, thread])
        plgpu.wait_smem_to_gmem(0)


kernel = plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct((BLOCKS, 2, 64, n), jnp.bfloat16) for n in (256, 128)],
    scratch_types=[
        smem(64, 64), smem(64, 256), smem(64, 128), smem(2, 64, 256), smem(2, 64, 128), plgpu.Barrier(num_arrivals=3),
    ],
    grid=(BLOCKS,), grid_names=("block",), num_threads=3, thread_name="warpgroup",
)  # fmt: skip


def main():
    folder = tempfile.mkdtemp()
    os.environ |= {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}  # read when a kernel is compiled
    sizes = [(64, 64), (64, 256), (64, 128)]
    a, b, c = (0.1 * jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16) for i, s in enumerate(sizes))
    run = jax.jit(kernel)
    wide, narrow = jax.block_until_ready(run(a, b, c))
    for out, right in ((wide, b), (narrow, c)):  # the sum of a right / 2^n
        error = jnp.abs(out - 2 * a.astype(jnp.float32) @ right.astype(jnp.float32)).max()
        print(f"largest error {error:.4f} of {jnp.abs(out).max():.2f}")
    times = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(run(a, b, c))
        times.append(time.perf_counter() - began)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {1e6 * sorted(times)[10] / STEPS:.3f} us a step")
    for log in Path(folder).glob("*.ptxas"):
        print(log.read_text())


if __name__ == "__main__":
    main()
