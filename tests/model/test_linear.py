"""Projections: what is summed in float32 and its gradients, and biases as GPUs get them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.layers import Linear
from jaxhybrid.model.partition import make_mesh, on_shards


class Projection(Linear):
    def __init__(self, config, rngs):
        super().__init__(rngs, *config[:2], bias=config[2])


def product(config, params, x, dtype=None):
    return bind(Projection, config, params)(x, dtype)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2, 1)], ids=["one device", "mesh"])
def test_sums_in_float32_have_gradients_of_more_than_bfloat16(mesh):
    """Against float64. bfloat16 would make all cotangents 0.29 % smaller; a gradient's own rounding is up to 0.2 %."""
    config = (48, 6), ("embed", None), False
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.uniform(1, 2, size=(48, 6)), jnp.bfloat16)}
    x = jnp.asarray(rng.uniform(1, 2, size=(4, 32, 48)), jnp.bfloat16)
    d_y = (1.0029 * rng.choice([1, 2, 4], size=(4, 32, 6))).astype(np.float32)

    def local(params, x, d_y):
        y, pull = jax.vjp(partial(product, config, dtype=jnp.float32), params, x)
        return y, *pull(d_y)

    def both(*given):
        rows = P(("data", "fsdp"))
        return on_shards(local, given, (P(), rows, rows), (rows, P(), rows))

    if mesh is None:
        y, d_params, d_x = jax.jit(local)(params, x, d_y)
    else:
        with jax.set_mesh(make_mesh(*mesh)):
            y, d_params, d_x = jax.jit(both)(params, x, d_y)
    exact_x, exact_w = (np.asarray(a, np.float64) for a in (x, params["kernel"]))
    assert (y.dtype, d_params["kernel"].dtype, d_x.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    for found, expected, bound in (
        (y, exact_x @ exact_w, 1e-5),
        (d_params["kernel"], np.einsum("bta,bto->ao", exact_x, d_y), 2**-8),  # their own rounding
        (d_x, d_y @ exact_w.T, 2**-8),
    ):
        scale = np.maximum(np.abs(expected), 1e-2 * np.abs(expected).max())
        error = np.abs(np.asarray(found, np.float64) - expected) / scale
        assert error.max() < bound


def test_biases_of_heads_are_vectors_on_gpus():
    """Of anything else XLA makes an array as large as the product."""
    config = (16, 4, 8), ("embed", "heads", "head_dim"), True
    kernel, bias = jax.random.normal(jax.random.key(0), (16, 4, 8)), jnp.arange(32.0).reshape(4, 8)
    params = {"kernel": kernel, "bias": bias}
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    run = jax.jit(partial(product, config))
    np.testing.assert_allclose(run(params, x), jnp.einsum("bta,ahk->bthk", x, kernel) + bias, atol=1e-5)
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        text = export.export(jax.jit(partial(product, config)), platforms=["cuda"])(params, x).mlir_module()
    assert re.search(r"stablehlo.add .*tensor<2x5x32xf32>", text)
    assert not re.search(r"stablehlo.add .*tensor<2x5x4x8xf32>", text)
