"""Products of one row: the kernel interpreted, with everything before and after the product, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels import row_product
from jaxhybrid_kernels.gpu.row_product import Blocks, row_product_kernel
from jaxhybrid_kernels.row_product import blocks_of

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"))


def operands(outputs, inputs, *, gated=False, dtype=jnp.float32):
    """x, weight, bias, and what is named: norm and residual."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    given = {"norm": (1 + draw(inputs), 1e-3), "residual": draw(1, 1, outputs // (2 if gated else 1)), "gated": gated}
    return draw(1, 1, inputs), draw(outputs, inputs) / inputs**0.5, draw(outputs), given


def exact(x, weight, bias, *, norm=None, residual=0, gated=False):
    """In float64, step by step."""
    x, weight, bias, residual = (np.asarray(a, np.float64) for a in (x, weight, bias, residual))
    if norm is not None:
        x = x / np.sqrt(np.mean(x**2) + norm[1]) * np.asarray(norm[0], np.float64)
    y = x @ weight.T + bias
    if gated:
        a, b = np.split(y, 2, axis=-1)
        y = a / (1 + np.exp(-a)) * b
    return y + residual


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("without", [(), ("norm",), ("residual",)])
def test_equals_its_steps_in_float64(implementation, gated, without):
    x, weight, bias, given = operands(48, 192, gated=gated)
    given = {name: value for name, value in given.items() if name not in without}
    y = row_product(x, weight, bias, implementation=implementation, **given)
    np.testing.assert_allclose(y, exact(x, weight, bias, **given), rtol=2e-5, atol=2e-5)


def test_the_kernel_rounds_less_than_xla_in_bfloat16():
    x, weight, bias, given = operands(48, 192, gated=True, dtype=jnp.bfloat16)
    expected = exact(x, weight, bias, **given)
    errors = {
        form: np.abs(row_product(x, weight, bias, implementation=form, **given).astype(jnp.float32) - expected).max()
        for form in ("xla", "triton")
    }
    assert errors["triton"] <= errors["xla"] < 0.1
    y = row_product(x, weight, implementation="triton", dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact(x, weight, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [Blocks(2, 64, 1), Blocks(4, 128, 2, ahead=2), Blocks(8, 512, 4, ahead=3)])
def test_every_division_gives_the_same(blocks):
    """Sums of whole blocks, and with a rest."""
    x, weight, bias, given = operands(32, 264, gated=True)
    (scale, eps), residual = given["norm"], given["residual"]
    y = row_product_kernel(
        x[0], weight, bias, scale, eps, residual[0], True, x.dtype, blocks=blocks, interpret=True
    )  # fmt: skip
    np.testing.assert_allclose(y[None], exact(x, weight, bias, **given), rtol=2e-5, atol=2e-5)


def test_blocks_divide_the_results():
    assert blocks_of(6168, 1536, False).outputs == 4
    assert blocks_of(2 * 6166, 1536, True).outputs == 2
    assert blocks_of(1537, 8960, False).outputs == 1
    assert blocks_of(1536, 8961, False) is None


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": jnp.zeros((2, 64))}, r"x has shape \(2, 64\), implementation='triton' takes one row"),
        ({"x": jnp.zeros((1, 64), jnp.float16)}, "x has dtype float16"),
        ({"weight_OD": jnp.zeros((15, 63)), "x": jnp.zeros((1, 63))}, r"weight has shape \(15, 63\)"),
    ],
)
def test_refusals_name_the_value(changed, told):
    with pytest.raises(ValueError, match=told):
        row_product(**{"x": jnp.zeros((1, 64)), "weight_OD": jnp.zeros((16, 64))} | changed, implementation="triton")


def test_lowered_for_cuda_one_row_is_one_kernel():
    """Chosen by itself on an NVIDIA GPU; more rows go to XLA."""
    x, weight, bias, given = operands(64, 128, gated=True, dtype=jnp.bfloat16)

    def calls(x):
        run = jax.jit(lambda x, weight, bias, residual: row_product(x, weight, bias, **given | {"residual": residual}))
        with jax.sharding.use_abstract_mesh(H100):
            text = export.export(run, platforms=["cuda"], disabled_checks=[
                export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
            ])(x, weight, bias, x[..., :1] * given["residual"]).mlir_module()  # fmt: skip
        return text.count("xla.gpu.triton"), text.count("stablehlo.dot_general")

    assert calls(x) == (1, 0)
    assert calls(jnp.tile(x, (2, 1, 1))) == (0, 1)
