"""Are constants of a product's left operand there when it reads them? On a Hopper GPU, with jax[cuda13] alone:

    python constants_of_products.py

Sums over the rows from each on of a and of b, and over the rows before it of c and of d, by products with triangles of
ones that are made in registers. Prints how many of the results of many blocks, all of the same numbers, are wrong, and
by how much.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCKS, SIZE = 4096, 64
TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def body(x, out, tiles, loaded):
    block = lax.axis_index("block")
    plgpu.copy_gmem_to_smem(x, tiles, loaded)
    row, column = (plgpu.broadcasted_iota(jnp.int32, (SIZE, SIZE), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    from_own_on, before = (jnp.where(holds, 1.0, 0.0).astype(jnp.bfloat16) for holds in (column >= row, column < row))
    plgpu.barrier_wait(loaded)

    def add(total):
        for i, left in enumerate((from_own_on, from_own_on, before, before)):
            plgpu.wgmma(total, left, tiles.at[i])
        return total[...]

    out[block] = pl.run_scoped(add, plgpu.ACC((SIZE, SIZE), jnp.float32))


kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((BLOCKS, SIZE, SIZE), jnp.float32),
    scratch_types=[
        plgpu.SMEM((4, SIZE, SIZE), jnp.bfloat16, transforms=TILES), plgpu.Barrier(num_arrivals=1),
    ],
    grid=(BLOCKS,), grid_names=("block",),
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
)  # fmt: skip


def main():
    x = jax.random.normal(jax.random.key(0), (4, SIZE, SIZE), jnp.bfloat16)
    out = jax.jit(kernel)(x)
    ones = jnp.ones((SIZE, SIZE))
    with jax.default_matmul_precision("highest"):
        exact = jnp.triu(ones) @ (x[0] + x[1].astype(jnp.float32)) + jnp.tril(ones, -1) @ (
            x[2] + x[3].astype(jnp.float32)
        )
    errors = jnp.abs(out - exact).max((1, 2))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {int((errors > 1e-3).sum())} of {BLOCKS} blocks are "
        f"wrong, by at most {errors.max():.3g}; results are up to {jnp.abs(exact).max():.3g}"
    )


if __name__ == "__main__":
    main()
