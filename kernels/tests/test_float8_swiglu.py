"""SwiGLU between float8 products: both forms against float64, and where the kernel is chosen."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels import float8_swiglu

FLOAT8 = ml_dtypes.float8_e4m3fn


def sums(rows, width, dtype=np.float32):
    """Sums and scales; one row is zeros, others differ by eight powers of ten."""
    rng = np.random.default_rng(0)
    gate, up = (rng.normal(size=(rows, width)).astype(dtype) for _ in range(2))
    gate[1] = 0
    columns = (0.1 + rng.random(width, np.float32) for _ in range(2))
    return gate, up, np.logspace(-4, 4, rows, dtype=np.float32), *columns


def in_float64(gate, up, row_scale, gate_scale, up_scale):
    g, u = (
        np.asarray(x, np.float64) * row_scale[:, None] * columns for x, columns in ((gate, gate_scale), (up, up_scale))
    )
    return g / 2 * (1 + np.tanh(g / 2)) * u


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("width", "dtype"), [(48, np.float32), (2048, ml_dtypes.bfloat16), (4500, np.float32)])
def test_equals_float64_rounded(implementation, width, dtype):
    given = sums(5, width, dtype)
    values, scale = float8_swiglu(*map(jnp.asarray, given), implementation=implementation)
    assert (values.dtype, scale.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    expected = in_float64(*given)
    np.testing.assert_allclose(scale, np.maximum(np.abs(expected).max(1), 1e-30) / 448, rtol=1e-5)
    actual, rounded = np.asarray(values, np.float64), (expected / np.asarray(scale)[:, None]).astype(FLOAT8)
    assert np.all(actual[1] == 0)
    assert np.abs(actual).max(1)[[0, 2, 3, 4]].tolist() == [448] * 4
    # Numbers between two of float8 may go the other way.
    near = actual == rounded.astype(np.float64)
    assert near.mean() > 0.995
    np.testing.assert_allclose(actual, rounded.astype(np.float64), rtol=0.126, atol=2**-9)


@pytest.mark.parametrize(
    ("device", "chosen"), [("NVIDIA H100 80GB HBM3", 1), ("NVIDIA A100-SXM4-40GB", 0)], ids=["Hopper", "Ampere"]
)
def test_where_the_kernel_is_chosen(device, chosen):
    """On devices that have a part of the columns each, as under `tensor`."""
    mesh = AbstractMesh(
        (2,), ("mlp",), (jax.sharding.AxisType.Explicit,), abstract_device=AbstractDevice(device, None, "cuda")
    )
    wide, columns, rows = jax.P(None, "mlp"), jax.P("mlp"), jax.P()
    specs = wide, wide, rows, columns, columns
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
        for x, spec in zip(sums(4, 4096, ml_dtypes.bfloat16), specs)
    ]
    run = jax.shard_map(float8_swiglu, in_specs=specs, out_specs=(wide, columns))
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(mesh):
        text = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=[check])(*given).mlir_module()
    assert text.count("xla.gpu.triton") == chosen


def test_refusal_names_the_size():
    given = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(2**17, 2**14)] * 2 + [(2**17,), (2**14,), (2**14,)]
    ]
    with pytest.raises(ValueError, match=r"shape \(131072, 16384\)"):
        jax.eval_shape(lambda *x: float8_swiglu(*x, implementation="triton"), *given)


def test_refusal_names_the_axes():
    mesh = jax.make_mesh((2,), ("mlp",), axis_types=(jax.sharding.AxisType.Explicit,))
    gate, up, *scales = map(jnp.asarray, sums(4, 64))
    with jax.set_mesh(mesh):
        split = jax.device_put(gate, jax.NamedSharding(mesh, jax.P(None, "mlp")))
        with pytest.raises(ValueError, match=r"split over \['mlp'\]"):
            float8_swiglu(split, up, *scales, implementation="triton")
