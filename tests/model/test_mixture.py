"""Mixtures of experts: against every expert on every token, masked; and the plan's figures of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.decoding.generate import generate
from jaxhybrid.errors import ConfigError, TopologyError
from jaxhybrid.model.blueprint import bind, count_active, count_parameters, variables
from jaxhybrid.model.config import ExpertsConfig, ModelConfig
from jaxhybrid.model.layers import ACTIVATIONS, Mixture
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import batch_sharding, make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, hidden_states, model_variables
from jaxhybrid.plan.liveness import peak_bytes
from jaxhybrid.plan.operations import Branches, operations
from jaxhybrid.plan.work import PRODUCTS, work
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.decoding.conftest import recomputed

E, D, F, N = 6, 32, 24, 21
EXPERTS = ExpertsConfig(E, 2, F, normalise=True)
CONFIG = ModelConfig(
    family="llama", vocab_size=61, hidden_size=D, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=8, norm_eps=1e-5, max_position_embeddings=64, experts=EXPERTS,
)  # fmt: skip


def masked(params, x, config):
    """Every expert on every token; what was not chosen counts with weight zero."""
    scores = jax.nn.softmax(x @ params["gate"]["kernel"], axis=-1)
    smallest = jnp.sort(scores, axis=-1)[..., -config.experts.active, None]
    weights = jnp.where(scores >= smallest, scores, 0)
    if config.experts.normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    gate, up, down = (params["experts"][name]["kernel"] for name in ("gate_proj", "up_proj", "down_proj"))
    inner = ACTIVATIONS[config.activation](jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
    return jnp.einsum("nef,efd,ne->nd", inner, down, weights)


def mixture(params, x, config):
    return bind(Mixture, config, params)(x)


def drawn(config, lean=0.0):
    """Random parameters and rows; with `lean` the router favours one expert for all of them."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda v: rng.normal(size=v.shape) / 4, variables(Mixture, config), is_leaf=is_declared)
    x = rng.normal(size=(N, D)) + (x_lean := lean * np.ones(D))
    params["gate"]["kernel"][:, 3] += lean * x_lean
    return params, x


def is_declared(leaf):
    return hasattr(leaf, "out_sharding")


@pytest.mark.parametrize(
    ("changes", "activation", "lean"),
    [
        ({}, "silu", 0.0),
        ({"normalise": False}, "gelu_tanh", 0.0),
        ({"active": 1}, "silu", 2.0),  # one expert has all rows, the others none
        ({"active": E}, "silu", 0.0),
    ],
)
def test_values_and_each_gradient(changes, activation, lean):
    config = replace(CONFIG, experts=replace(EXPERTS, **changes), activation=activation)
    with jax.enable_x64(True):
        params, x = drawn(config, lean)
        if lean:
            assert (np.argmax(x @ params["gate"]["kernel"], -1) == 3).all()
        weights = np.random.default_rng(1).normal(size=(N, D))

        def loss(function, params, x):
            out = function(params, x, config)
            return jnp.sum(out * weights.astype(out.dtype)), out

        def graded(function, dtype):
            given = jax.tree.map(lambda v: jnp.asarray(v, dtype), (params, x))
            taken = jax.jit(jax.grad(loss, argnums=(1, 2), has_aux=True), static_argnums=0)
            return taken(function, *given)

        exact = graded(masked, jnp.float64)
        for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 2e-5))[: 1 if changes else 2]:
            paths, _ = jax.tree_util.tree_flatten_with_path(graded(mixture, dtype))
            assert {leaf.dtype for _, leaf in paths} == {np.dtype(dtype)}
            for (path, ours), theirs in zip(paths, jax.tree.leaves(exact)):
                scale = max(np.abs(theirs).max(), 1e-3)  # a router of one normalised weight has no gradient
                np.testing.assert_allclose(ours / scale, theirs / scale, atol=tolerance, err_msg=str(path))


def student_and_batch():
    teacher = make_teacher(experts=EXPERTS, num_layers=3)
    kinds, mixer = (GatedDeltaNetConfig.kind, "full_attention", GatedDeltaNetConfig.kind), GatedDeltaNetConfig()
    return jax.jit(convert, static_argnums=(1, 2))(teacher, kinds, mixer, jax.random.key(0)), make_batch(61)


def graded(model, batch, remat):
    def loss(params):
        x = hidden_states(Model(params, model.config), batch["tokens"], batch["segment_ids"], remat=remat)
        return jnp.sum(x * jnp.cos(jnp.arange(x.shape[-1])))

    return jax.jit(jax.value_and_grad(loss))(model.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "sizes"),
    [
        ("none", {"fsdp": 2, "tensor": 2}),
        ("mlp", {"fsdp": 2, "tensor": 2}),
        ("block", {"data": 2, "context": 2}),
        ("dots", {"tensor": 4}),
    ],
)
def test_on_a_mesh_and_recomputed_it_is_the_same(remat, sizes):
    model, batch = student_and_batch()
    loss, gradients = graded(model, batch, "none")
    mesh = make_mesh(**{"fsdp": 1} | sizes, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = Model(jax.device_put(model.params, param_shardings(model.declared, mesh)), model.config)
        split = graded(placed, jax.device_put(batch, batch_sharding(mesh)), remat)
    np.testing.assert_allclose(split[0], loss, rtol=1e-5)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(split[1]), jax.tree.leaves(gradients)):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), err_msg=str(path))


@pytest.mark.slow
def test_text_is_that_of_recomputation_on_a_mesh_too():
    model, _ = student_and_batch()
    prompts = [[3, 9, 4, 17, 2], [8]]
    expected = recomputed(model, prompts, 6)
    assert generate(model, prompts, 6) == expected
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(model.params, param_shardings(model.declared, mesh))
        assert generate(replace(model, params=placed), prompts, 6) == expected


def test_experts_that_do_not_divide_are_refused():
    config = replace(CONFIG, experts=replace(EXPERTS, width=25))
    with pytest.raises(TopologyError, match=r"experts.*: 25 does not divide over tensor=2"):
        param_shardings(model_variables(config), make_mesh(tensor=2))
    with pytest.raises(ConfigError, match=r"7 of 6 experts"):
        replace(EXPERTS, active=7)
    with pytest.raises(ConfigError, match="mlp_bias"):
        replace(config, mlp_bias=True)


def test_a_plan_counts_the_products_of_chosen_experts_and_the_bytes_of_all():
    def figures(**changes):
        config = replace(CONFIG, experts=replace(EXPERTS, **changes))
        params = jax.tree.map(lambda v: jnp.zeros(v.shape), variables(Mixture, config), is_leaf=is_declared)

        def loss(params, x):
            return jnp.sum(mixture(params, x, config) ** 2)

        jaxpr = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, jnp.zeros((N, D))).jaxpr.jaxpr
        found = work(operations(jaxpr, Branches("tpu")))
        return found.flops[PRODUCTS], found.moved, peak_bytes(jaxpr)

    passes = 3  # forward, and the gradients of rows and weights
    router, expert = passes * 2 * N * D * E, passes * 2 * N * 3 * D * F
    (flops, moved, _), (more_flops, more_moved, _) = figures(), figures(count=2 * E)
    assert flops == router + 2 * expert
    assert more_flops == 2 * router + 2 * expert  # twice the experts
    assert more_moved - moved > passes * 3 * E * D * F * 4
    # Four sorted copies of the rows are the least: into the products and out, and gradients of both.
    assert figures(active=4)[2] - figures()[2] > 2 * N * (2 * F + D) * 4


def test_parameters_that_a_token_meets():
    declared, expert = model_variables(CONFIG), 3 * D * F
    assert count_parameters(declared) - count_active(declared, CONFIG) == CONFIG.num_layers * (E - 2) * expert
    dense = replace(CONFIG, experts=None)
    assert count_active(model_variables(dense), dense) == count_parameters(model_variables(dense))
