"""MLPs that multiply in float8 against the same in NumPy, and the stages that ask their teacher for them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import bind, initialize, variables
from jaxhybrid.model.config import ExpertsConfig
from jaxhybrid.model.float8 import product, scaled
from jaxhybrid.model.layers import MLP
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh, on_shards, param_shardings, param_specs
from jaxhybrid.model.transformer import forward, hidden_states
from jaxhybrid.settings.read import parse_config
from jaxhybrid.stages.align import align_loss, align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.programs import stage_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.tiny import training

ROWS = P(("data", "fsdp"), "context")
CONFIG = replace(make_teacher().config, intermediate_size=96, mlp_bias=True)
IN_FLOAT8 = replace(CONFIG, float8_mlp=True)


def rounded(x, axis):
    """What float8 with a scale makes of float32 numbers, in float64."""
    x = np.asarray(x, np.float32)
    scale = np.maximum(np.abs(x).max(axis, keepdims=True), np.float32(1e-30)) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def written_out(params, x):
    """The MLP of one device [N,D] in float64, but for what is rounded."""

    def linear(part, rows):
        return rows @ rounded(params[part]["kernel"], 0) + np.asarray(params[part].get("bias", 0), np.float64)

    rows = rounded(x, -1)
    gate, up = linear("gate_proj", rows), linear("up_proj", rows)
    return linear("down_proj", rounded(gate * 0.5 * (1 + np.tanh(gate / 2)) * up, -1))


def params_and_rows(dtype=np.float32):
    """Weights, and rows among which one is zeros and others differ by twelve powers of ten."""
    rng = np.random.default_rng(0)
    params = jax.jit(lambda key: initialize(MLP, CONFIG, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, dtype), params)
    x = rng.normal(size=(2, 5, CONFIG.hidden_size)) * np.logspace(-6, 6, 10).reshape(2, 5, 1)
    x[1, 2] = 0
    return params, jnp.asarray(x, dtype)


def run(config, params, x):
    return jax.jit(lambda params, x: bind(MLP, config, params)(x))(params, x)


def off(actual, expected):
    """Of each row, the error's length over the row's."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)


def test_a_product_is_that_of_rounded_rows_and_columns():
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(3, 4, 48)) * np.logspace(-8, 8, 12).reshape(3, 4, 1)).astype(np.float32)
    kernel = (rng.normal(size=(48, 32)) * np.logspace(-8, 8, 32)).astype(np.float32)
    x[1, 2], kernel[:, 5] = 0, 0
    actual = jax.jit(lambda x, kernel: product(scaled(x, -1), kernel, jnp.float32).scaled(jnp.float32))(x, kernel)
    expected = rounded(x, -1) @ rounded(kernel, 0)
    size = np.abs(x).max(-1, keepdims=True) * np.abs(kernel).max(0)
    assert np.all(np.abs(actual - expected) <= 1e-5 * size)
    # An error of a thirty-second at most in each factor, whatever others in its matrix are.
    bound = (np.abs(x) @ np.abs(kernel)) / 15 + 0.02 * size
    assert np.all(np.abs(actual - np.asarray(x, np.float64) @ kernel) <= bound)


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_equals_the_one_written_out(bias):
    params, x = params_and_rows()
    if not bias:
        params = {name: {"kernel": part["kernel"]} for name, part in params.items()}
    actual = run(replace(IN_FLOAT8, mlp_bias=bias), params, x)
    expected = written_out(params, x.reshape(10, -1)).reshape(x.shape)
    np.testing.assert_allclose(off(actual, expected), 0, atol=1e-5)
    from_exact = off(actual, run(replace(CONFIG, mlp_bias=bias), params, x))
    assert from_exact.max() < 0.1
    assert from_exact.mean() > 0.01


def test_in_bfloat16_it_differs_by_bfloat16s_rounding():
    params, x = params_and_rows(ml_dtypes.bfloat16)
    actual = run(IN_FLOAT8, params, x)
    assert actual.dtype == jnp.bfloat16
    expected = written_out(params, x.reshape(10, -1)).reshape(x.shape)
    assert off(actual, expected).max() < 0.05  # numbers between two of float8 go the other way
    assert np.median(off(actual, expected)) < 0.01


def test_devices_scale_their_own_parts():
    """Of the width of the MLP: two halves by themselves, summed, with the last bias once."""
    params, x = params_and_rows()
    mesh = make_mesh(fsdp=1, tensor=2, devices=jax.devices()[:2])
    declared = variables(MLP, CONFIG)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(declared, mesh))
        specs = param_specs(declared, mesh)

        def local(params, x):
            return bind(MLP, IN_FLOAT8, params)(x)

        actual = jax.jit(lambda params, x: on_shards(local, (params, x), (specs, ROWS), ROWS))(placed, x)
    F = CONFIG.intermediate_size // 2
    halves = []
    for own in (slice(0, F), slice(F, None)):
        half = {
            name: {"kernel": params[name]["kernel"][:, own], "bias": params[name]["bias"][own]}
            for name in ("gate_proj", "up_proj")
        } | {"down_proj": {"kernel": params["down_proj"]["kernel"][own], "bias": np.zeros(CONFIG.hidden_size)}}
        halves.append(written_out(half, x.reshape(10, -1)))
    expected = (sum(halves) + np.asarray(params["down_proj"]["bias"], np.float64)).reshape(x.shape)
    np.testing.assert_allclose(off(actual, expected), 0, atol=1e-5)


def float8_products(jaxpr):
    """(of numbers in float8, of others) in a program and all of its parts."""
    counts = np.zeros(2, int)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            counts[0 if all(x.aval.dtype == jnp.float8_e4m3fn for x in equation.invars) else 1] += 1
        for given in equation.params.values():
            for part in given if isinstance(given, tuple) else (given,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    counts += float8_products(inner)
    return counts


def test_distillation_from_it_is_to_what_it_says():
    teacher, batch = make_teacher(num_layers=2), make_batch(61)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x * (1 + 0.1 * rng.normal(size=x.shape).astype(np.float32)), teacher.params)
    optimizer = make_optimizer(training(10), params)
    step = partial(distill_step, config=teacher.config, optimizer=optimizer, dtype=jnp.float32)
    asked = partial(step, float8_teacher=True)
    given = start(params, optimizer), teacher, batch

    @jax.jit
    def dense(model):
        log_p, log_q = (
            jax.nn.log_softmax(forward(one, batch["tokens"], batch["segment_ids"]))
            for one in (model, replace(teacher, params=params))
        )
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return jnp.mean(kl, where=batch["segment_ids"] != 0)

    in_float8 = teacher.in_float8()
    loss, expected, exact = float(jax.jit(asked)(*given)[1]["loss"]), float(dense(in_float8)), float(dense(teacher))
    assert abs(expected / exact - 1) > 0.01
    assert loss == pytest.approx(expected, rel=1e-3)

    assert_in_the_teacher_alone("distill", teacher.config, optimizer, given)


def assert_in_the_teacher_alone(stage, config, optimizer, given):
    """As the setting asks for it: in the teacher's one loop, and nothing of the student's."""

    def counted(asked):
        run = {"name": "run", "teacher": "t", "data": {"train": "pydoc"}, stage: {"float8_teacher": asked}}
        return float8_products(stage_step(stage, parse_config(run), config, optimizer).trace(*given).jaxpr)

    plain, changed = counted(False), counted(True)
    assert plain[0] == 0
    assert (changed - plain).tolist() == [3, -3]


def test_alignment_from_it_is_to_what_it_says():
    teacher, batch = make_teacher(num_layers=2), make_batch(61)
    mixer = GatedDeltaNetConfig()
    student = jax.jit(convert, static_argnums=(1, 2))(teacher, (mixer.kind,) * 2, mixer, jax.random.key(1))
    mixers = linear_mixers(student.params)
    optimizer = make_optimizer(training(10), mixers)
    given = start(mixers, optimizer), teacher, batch
    own = {"config": student.config, "dtype": jnp.float32}
    step = jax.jit(partial(align_step, **own, optimizer=optimizer, float8_teacher=True))
    losses = jax.jit(partial(align_loss, **own))
    found, expected = step(*given)[1]["layer_loss"], losses(mixers, teacher.in_float8(), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    change = np.abs(expected / losses(mixers, teacher, batch) - 1)
    assert change[0] < 1e-6 < 1e-3 < change[1]  # no MLP is before the first layer
    assert_in_the_teacher_alone("align", student.config, optimizer, given)


def test_a_teacher_in_float8_on_a_mesh_is_as_near_as_on_one_device():
    teacher, batch = make_teacher(), make_batch(61)
    in_float8 = teacher.in_float8()
    states = jax.jit(lambda model, batch: hidden_states(model, batch["tokens"], batch["segment_ids"]))
    exact, one = states(teacher, batch), states(in_float8, batch)
    mesh = make_mesh(1, 2, 2, 2)
    with jax.set_mesh(mesh):
        placed = replace(in_float8, params=jax.device_put(teacher.params, param_shardings(teacher.declared, mesh)))
        split = np.asarray(states(placed, batch))
    real = np.asarray(batch["segment_ids"]) != 0
    alone, together, between = (np.sqrt(np.mean(np.square(off(x, y)[real]))) for x, y in (
        (one, exact), (split, exact), (split, one)
    ))  # fmt: skip
    assert 0.01 < alone < 0.2
    assert together < 1.2 * alone
    assert between < 1.2 * alone


def test_experts_are_refused():
    experts = ExpertsConfig(count=4, active=2, width=16, normalise=True)
    with pytest.raises(ConfigError, match="float8_mlp"):
        replace(IN_FLOAT8, experts=experts, mlp_bias=False)
