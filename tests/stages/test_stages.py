"""Each stage's step: its gradients against plain autodiff, one program for all candidates, one device against eight."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import Model, hidden_states, random_params
from jaxhybrid.stages.align import align_loss, alignment_gradients, linear_mixers
from jaxhybrid.stages.score import candidate_params
from jaxhybrid.weights.convert import convert, with_softmax_layers
from tests.oracles import plain_alignment
from tests.tiny import training

F, G = FULL_ATTENTION, GatedDeltaNetConfig.kind
MIXER = GatedDeltaNetConfig()
# A large eps keeps the first Adam update proportional to the gradient: with none it is the sign of rounding noise.
RATES = training(10, learning_rate=1e-3, mixer_learning_rate=1e-2, eps=1e-2)


@pytest.fixture(scope="module")
def linear(teacher):
    return convert(teacher, (G,) * 4, MIXER, jax.random.key(1))


@pytest.fixture(scope="module")
def hybrid(teacher):
    return convert(teacher, (G, F, G, G), MIXER, jax.random.key(1))


def close(actual, expected, tolerance=1e-4):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(np.abs(b).max(), 1e-6)
        assert np.abs(a - b).max() <= tolerance * scale, (jax.tree_util.keystr(path), np.abs(a - b).max(), scale)


@pytest.mark.parametrize(("which", "unroll"), [("linear", False), ("hybrid", False), ("hybrid", True)])
def test_alignment_gradients_equal_autodiff(which, unroll, request, teacher, batch):
    student = request.getfixturevalue(which)
    mixers = linear_mixers(student.params)
    compute = partial(alignment_gradients, config=student.config, dtype=jnp.float32, unroll=unroll)
    losses, gradients = jax.jit(compute)(mixers, teacher, batch)
    expected = jax.jit(jax.value_and_grad(lambda m: jnp.mean(plain_alignment(m, teacher, student.config, batch))))(
        mixers
    )
    np.testing.assert_allclose(jnp.mean(losses), expected[0], rtol=1e-5)
    close(gradients, expected[1])


def test_alignment_memory_does_not_grow_with_depth(teacher):
    """Doubling the depth adds parameters and their gradients, and no activations."""
    tokens, memory = 8 * 512, {}
    for depth in (4, 8):
        config = replace(teacher.config, num_layers=depth, layer_types=(F,) * depth)
        student = replace(config, layer_types=(G,) * depth, mixer=replace(MIXER, qkv_bias=False, qk_norm=False))
        shapes = jax.eval_shape(lambda c=config: random_params(c, jax.random.key(0)))
        mixers = jax.eval_shape(lambda c=student: linear_mixers(random_params(c, jax.random.key(0))))
        batch = {name: jax.ShapeDtypeStruct((8, 512), jnp.int32) for name in ("tokens", "segment_ids")}
        step = jax.jit(partial(alignment_gradients, config=student, dtype=jnp.float32))
        compiled = step.lower(mixers, Model(shapes, config), batch).compile()
        parameters = sum(x.size * 4 for x in jax.tree.leaves((shapes, mixers)))
        memory[depth] = compiled.memory_analysis().temp_size_in_bytes, parameters
    grown = memory[8][0] - memory[4][0]
    assert grown < 3 * (memory[8][1] - memory[4][1])
    assert grown < 4 * tokens * teacher.config.hidden_size * 4  # less than one [B,T,D] array per added layer


def test_candidate_equals_the_hybrid_it_stands_for_in_one_program(teacher, linear, batch):
    @jax.jit
    def run(params, layer):
        student = Model(params, linear.config)
        return hidden_states(student, batch["tokens"], batch["segment_ids"], softmax=jnp.arange(4) == layer)

    make = jax.jit(candidate_params)
    for layer in range(4):
        types = tuple(F if i == layer else G for i in range(4))
        hybrid = with_softmax_layers(linear, teacher, types)
        expected = hidden_states(hybrid, batch["tokens"], batch["segment_ids"])
        actual = run(make(linear, teacher, jnp.int32(layer)), jnp.int32(layer))
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert run._cache_size() == 1
    assert make._cache_size() == 1


def test_one_program_runs_every_hybrid(teacher, linear, batch):
    """With attention of every layer at hand, any choice of softmax layers: values and each gradient."""
    mixers = linear.params["mixers"] | {F: teacher.params["mixers"][F]}

    @jax.jit
    def loss(params, softmax):
        student = Model(params, linear.config)
        return jnp.sum(jnp.sin(hidden_states(student, batch["tokens"], batch["segment_ids"], softmax=softmax)))

    gradients = jax.jit(jax.grad(loss))
    for chosen in ((), (0, 3), (1, 2, 3), (0, 1, 2, 3)):
        mask = jnp.isin(jnp.arange(4), jnp.array(chosen, jnp.int32))
        params = linear.params | {"mixers": mixers}
        types = tuple(F if i in chosen else G for i in range(4))
        hybrid = with_softmax_layers(linear, teacher, types)

        def plain(params, config=hybrid.config):
            return jnp.sum(jnp.sin(hidden_states(Model(params, config), batch["tokens"], batch["segment_ids"])))

        value, expected = jax.jit(jax.value_and_grad(plain))(hybrid.params)
        np.testing.assert_allclose(loss(params, mask), value, rtol=1e-5)
        actual = gradients(params, mask)
        for kind, layers in ((F, chosen), (G, [i for i in range(4) if i not in chosen])):
            if len(layers):
                actual["mixers"][kind] = jax.tree.map(
                    lambda w, at=tuple(layers): w[jnp.array(at)], actual["mixers"][kind]
                )
        actual["mixers"] = {kind: actual["mixers"][kind] for kind in expected["mixers"]}
        close(actual, expected)
    assert loss._cache_size() == gradients._cache_size() == 1


def test_alignment_loss_matches_the_training_loss(teacher, linear, batch):
    static = {"config": linear.config, "dtype": jnp.float32}
    mixers = linear_mixers(linear.params)
    losses, _ = alignment_gradients(mixers, teacher, batch, **static)
    np.testing.assert_allclose(align_loss(mixers, teacher, batch, **static), losses, rtol=1e-5)
