"""The TPU kernels of the short convolution, interpreted, against the XLA form: results and each gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels import short_convolution

PACKED = [1, 0, 2, 2, 3], [0, 5, 6, 6, 0]  # padding on the left, on the right and between segments


def make_arguments(T, W, layout, dtype=jnp.float32, C=128):
    rng = np.random.default_rng(0)
    shapes = {"x": (2, T, C), "weight": (W, C), "state": (2, W - 1, C)}
    arguments = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    cotangents = jnp.asarray(rng.normal(size=(2, T, C)), dtype), jnp.asarray(rng.normal(size=(2, W - 1, C)), dtype)
    segment_ids = None
    if layout is not None:
        lengths = [T // 5] * 4 + [T - 4 * (T // 5)]
        segment_ids = jnp.asarray(np.stack([np.repeat(ids, lengths) for ids in layout]), jnp.int32)
        arguments["x"] = jnp.where((segment_ids != 0)[..., None], arguments["x"], jnp.nan)
    return arguments, segment_ids, cotangents


def with_gradients(arguments, segment_ids, cotangents, implementation):
    def run(arguments):
        x, weight, state = arguments["x"], arguments["weight"], arguments["state"]
        return short_convolution(x, weight, segment_ids, state, implementation=implementation)

    results, pull = jax.vjp(run, arguments)
    return dict(zip(("y", "final"), results)) | pull(cotangents)[0]


@pytest.mark.parametrize(
    ("T", "W", "layout"),
    [
        (150, 4, None),
        (150, 4, PACKED),
        (600, 4, PACKED),  # more than one grid step
        (150, 2, PACKED),
        (2, 4, None),  # shorter than the filter
        (40, 4, ([0] * 5, [0, 0, 1, 0, 1])),  # nothing but padding; padding inside a segment
    ],
)
def test_results_and_gradients(suite, T, W, layout):
    arguments = make_arguments(T, W, layout)
    actual, expected = (
        jax.jit(with_gradients, static_argnums=3)(*arguments, implementation)
        for implementation in ("pallas_tpu", "xla")
    )
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=2e-5, err_msg=name)


def test_bfloat16(suite):
    arguments, segment_ids, cotangents = make_arguments(150, 4, None, jnp.bfloat16)
    actual = jax.jit(with_gradients, static_argnums=3)(arguments, segment_ids, cotangents, "pallas_tpu")
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangents))
    expected = jax.jit(with_gradients, static_argnums=3)(exact[0], segment_ids, exact[1], "xla")
    for name, value in expected.items():
        assert actual[name].dtype == jnp.bfloat16
        assert suite.relative_error(actual[name], value) < 0.01, name


def test_refusals():
    x, weight = jnp.zeros((1, 4, 96)), jnp.zeros((4, 96))
    with pytest.raises(ValueError, match="x has C=96 channels"):
        short_convolution(x, weight, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        short_convolution(x, weight, implementation="fast")
