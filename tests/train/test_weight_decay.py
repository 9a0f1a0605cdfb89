"""Weight decay is for matrices: every parameter of every family and mixer is labelled, and the optimizer obeys."""

from dataclasses import fields, replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhybrid.model.config import FULL_ATTENTION, MIXER_KINDS, GatedDeltaNetConfig, ModelConfig
from jaxhybrid.model.params import is_spec
from jaxhybrid.model.transformer import declare
from jaxhybrid.train.optimizer import decays, make_optimizer, parameter_groups, start, update
from tests.tiny import training

SMALL = ModelConfig(
    family="llama", vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, norm_eps=1e-5, max_position_embeddings=64, layer_types=(FULL_ATTENTION, "gated_deltanet"),
    gated_deltanet=GatedDeltaNetConfig(qkv_bias=False, qk_norm=False),
)  # fmt: skip
FLAGS = ("tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")  # what families differ in
MIXERS = [
    GatedDeltaNetConfig(expand_kv=expand, output_gate=gate, conv_size=taps, qkv_bias=bias, qk_norm=norm)
    for expand, gate, taps, bias, norm in product((True, False), (True, False), (0, 4), (True, False), (True, False))
]


def configs():
    for values in product((True, False), repeat=len(FLAGS)):
        yield replace(SMALL, **dict(zip(FLAGS, values)))
    for mixer in MIXERS:
        yield replace(SMALL, gated_deltanet=mixer)


def is_matrix(spec):
    """Read off the declaration: two axes or more in one layer, a vector of every head counting as one; what sets gates
    and decays stays float32."""
    axes = [axis for axis in spec.axes if axis != "layers"]
    width = "heads" in axes and "head_dim" in axes
    return len(axes) - width > 1 and not spec.float32


def test_every_parameter_is_labelled_by_its_name_as_its_declaration_has_it():
    labels = {}
    for config in configs():
        for path, spec in jax.tree_util.tree_leaves_with_path(declare(config), is_leaf=is_spec):
            assert decays(path) == is_matrix(spec), (jax.tree_util.keystr(path), spec.axes)
            labels[path[-1].key] = decays(path)
    assert {name for name, decayed in labels.items() if decayed} == {
        "embed", "head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "a_proj",
        "b_proj", "g_proj", "q_conv", "k_conv", "v_conv",
    }  # fmt: skip
    assert {name for name, decayed in labels.items() if not decayed} == {
        "input_norm", "post_norm", "final_norm", "q_norm", "k_norm", "o_norm", "q_bias", "k_bias", "v_bias", "o_bias",
        "gate_bias", "up_bias", "down_bias", "A_log", "dt_bias",
    }  # fmt: skip


def test_every_mixer_is_among_them():
    """A new mixer, or a new setting of one, belongs into the configs above."""
    assert set(SMALL.layer_types) == set(MIXER_KINDS)
    assert {f.name for f in fields(GatedDeltaNetConfig)} == {
        "expand_kv", "output_gate", "conv_size", "rope", "qkv_bias", "qk_norm", "gate_init", "decay_init",
    }  # fmt: skip


def test_only_matrices_shrink():
    config = replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, gated_deltanet=MIXERS[0])
    rng = np.random.default_rng(0)
    specs = declare(config)
    params = jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(np.float32), specs, is_leaf=is_spec)
    rates = {"mixer": 0.1, "rest": 0.01}
    settings = training(2, learning_rate=rates["rest"], mixer_learning_rate=rates["mixer"], weight_decay=0.5)
    optimizer = make_optimizer(settings, params)
    gradients = jax.tree.map(np.zeros_like, params)
    after = jax.jit(lambda params: update(start(params, optimizer), gradients, optimizer)[0].params)(params)
    groups = parameter_groups(params)
    for (path, old), new, group in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), jax.tree.leaves(groups), strict=True
    ):
        shrunk = 1 - rates[group] * 0.5 * decays(path)
        np.testing.assert_allclose(new, old * shrunk, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_state_is_that_of_optax_adamw(weight_decay):
    """Checkpoints made with optax's own AdamW are read."""
    params = {"blocks": {"up_proj": jnp.ones((2, 3)), "input_norm": jnp.ones(2)}, "embed": jnp.ones((4, 2))}
    optimizer = make_optimizer(training(1, weight_decay=weight_decay, clip_norm=None), params)
    groups = dict.fromkeys(("mixer", "rest"), optax.adamw(lambda step: 0.1, weight_decay=weight_decay))
    plain = optax.chain(optax.identity(), optax.partition(groups, parameter_groups(params)))
    assert jax.tree.structure(optimizer.init(params)) == jax.tree.structure(plain.init(params))
