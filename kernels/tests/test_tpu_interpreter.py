"""TPU kernels in Pallas' simulation of a TPU: every copy and buffer is there, memory holds NaN until it is written, and
reads and writes that could overtake one another are reported as races.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxhybrid_kernels import dplr_attention, linear_attention, short_convolution

# Two cores, as on TPU v4 and v5p, so that grid steps declared parallel are told apart.
SIMULATION = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)


@pytest.fixture(autouse=True)
def clean_simulation():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def simulate(function, *arguments):
    """The function's results with its kernels in the simulation; a race raises."""
    with pltpu.force_tpu_interpret_mode(SIMULATION):
        return jax.block_until_ready(jax.jit(lambda *arguments: function(*arguments))(*arguments))


def with_gradients(operator, segment_ids, arrays, cotangents):
    """(results, gradients by name)."""
    results, pull = jax.vjp(lambda arrays: operator(**arrays, segment_ids=segment_ids), arrays)
    return results, pull(cotangents)[0]


@pytest.mark.parametrize(
    ("recurrence", "sizes"),
    [
        ("gated_deltanet", {}),
        ("kimi_delta", {}),
        ("linear_attention", {"Hq": 4}),
        pytest.param("gated_deltanet", {"N": 16, "Hk": 8, "Hq": 8}, marks=pytest.mark.slow),
        pytest.param("deltanet", {"K": 64, "V": 128}, marks=pytest.mark.slow),
        pytest.param("simple_gla", {"B": 2}, marks=pytest.mark.slow),
        pytest.param("gla", {"B": 2}, marks=pytest.mark.slow),
    ],
)
def test_linear_attention(suite, recurrence, sizes):
    case = suite.make_case(recurrence, **({"B": 1} | sizes))
    case.segment_ids = np.where(np.arange(case.tokens) < 70, 3, 5)[None].repeat(case.d_out.shape[0], axis=0)
    case.norm_eps = 1e-6
    arrays, d_out, d_state = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (case.arrays, case.d_out, case.d_state)
    )

    def operator(**arguments):
        return linear_attention(**arguments, implementation="pallas_tpu", norm_eps=case.norm_eps)

    actual = simulate(
        lambda *arguments: with_gradients(operator, *arguments), jnp.asarray(case.segment_ids), arrays, (d_out, d_state)
    )
    suite.check(actual, suite.oracle(case))


def test_dplr(suite):
    B, T, N, K, V = 1, 70, 2, 16, 24
    rng = np.random.default_rng(0)
    kappa = rng.normal(size=(B, T, N, K))
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    arrays = {name: rng.normal(size=(B, T, N, K)) for name in ("q", "k")}
    arrays |= {"v": rng.normal(size=(B, T, N, V)), "log_decay": -0.2 * np.abs(rng.normal(size=(B, T, N, K)))}
    arrays |= {"a": -kappa, "b": kappa * rng.uniform(size=(B, T, N, K)), "initial_state": rng.normal(size=(B, N, K, V))}
    cotangents = rng.normal(size=(B, T, N, V)), rng.normal(size=(B, N, K, V))
    segment_ids = jnp.where(jnp.arange(T) < 40, 3, 5)[None]
    arrays, cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arrays, cotangents))

    def run(implementation, *arguments):
        return with_gradients(lambda **x: dplr_attention(**x, implementation=implementation), *arguments)

    actual = simulate(lambda *arguments: run("pallas_tpu", *arguments), segment_ids, arrays, cotangents)
    suite.check(actual, run("reference", segment_ids, arrays, cotangents))


def test_short_convolution():
    rng = np.random.default_rng(0)
    x, weight, state, d_y, d_final = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((1, 150, 256), (4, 256), (1, 3, 256), (1, 150, 256), (1, 3, 256))
    )
    segment_ids = jnp.where(jnp.arange(150) < 70, 3, 5)[None]

    def run(implementation, *arguments):
        results, pull = jax.vjp(
            lambda x, weight, state: short_convolution(x, weight, segment_ids, state, implementation), *arguments
        )
        return results, pull((d_y, d_final))

    actual = simulate(lambda *arguments: run("pallas_tpu", *arguments), x, weight, state)
    for value, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(run("xla", x, weight, state))):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("order", ["parallel", "arbitrary"])
def test_what_the_simulation_finds(order):
    """A sum kept in scratch that nobody clears, in steps that are declared independent or not."""

    def kernel(x_ref, out_ref, sum_ref):
        sum_ref[...] += x_ref[...]
        out_ref[...] = sum_ref[...]

    def sums(x):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            scratch_shapes=[pltpu.VMEM((8, 128), x.dtype)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=(order,)),
        )(x)

    if order == "parallel":
        with pytest.raises(Exception, match="race"):
            simulate(sums, jnp.ones((32, 128)))
    else:
        assert np.all(np.isnan(simulate(sums, jnp.ones((32, 128)))))
