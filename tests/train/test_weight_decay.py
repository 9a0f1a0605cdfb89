"""Weight decay is for matrices: every parameter of every family and mixer is labelled, and the optimizer obeys."""

from dataclasses import fields, replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhybrid.model.blueprint import Exact, is_variable
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.model.mixers.deltanet import DeltaNetConfig
from jaxhybrid.model.mixers.fixed_decay import FixedDecayConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.kimi_delta import KimiDeltaConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.mixers.rwkv7 import RWKV7Config
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.train.optimizer import decays, make_optimizer, parameter_groups, start, update
from tests.tiny import training

SMALL = ModelConfig(
    family="llama", vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, norm_eps=1e-5, max_position_embeddings=64, layer_types=(FULL_ATTENTION, "gated_deltanet"),
    mixer=GatedDeltaNetConfig(qkv_bias=False, qk_norm=False),
)  # fmt: skip
FLAGS = ("tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")  # what families differ in
MIXERS = [
    GatedDeltaNetConfig(expand_kv=expand, output_gate=gate, conv_size=taps, qkv_bias=bias, qk_norm=norm)
    for expand, gate, taps, bias, norm in product((True, False), (True, False), (0, 4), (True, False), (True, False))
]
OTHERS = [
    settings(qkv_bias=carried, qk_norm=carried)
    for settings in (
        GLAConfig, partial(DeltaNetConfig, conv_size=4), partial(KimiDeltaConfig, conv_size=4), FixedDecayConfig,
        Mamba2Config, RWKV6Config, RWKV7Config,
    )
    for carried in (True, False)
] + [WindowAttentionConfig()]  # fmt: skip


def configs():
    for values in product((True, False), repeat=len(FLAGS)):
        yield replace(SMALL, **dict(zip(FLAGS, values)))
    for mixer in (*MIXERS, *OTHERS):
        yield replace(SMALL, mixer=mixer, layer_types=(FULL_ATTENTION, mixer.kind))


def is_matrix(variable):
    """Read off the declaration: two axes or more in one layer, a vector of every head counting as one; what sets gates
    and decays stays float32."""
    axes = [axis for axis in variable.out_sharding if axis != "layers"]
    width = "head_dim" in axes and not {"heads", "kv_heads"}.isdisjoint(axes)
    return len(axes) - width > 1 and not isinstance(variable, Exact)


def test_every_parameter_is_labelled_by_its_name_as_its_declaration_has_it():
    labels = {}
    for config in configs():
        for path, variable in jax.tree_util.tree_leaves_with_path(model_variables(config), is_leaf=is_variable):
            assert decays(path) == is_matrix(variable), jax.tree_util.keystr(path)
            labels[path[-1].key] = decays(path)
    assert {name for name, decayed in labels.items() if decayed} == {"kernel", "embedding", "taps"}
    gates = {"A_log", "dt_bias", "D", "decay_bias", "rate_bias", "removal"}
    shift = {"mix", *(f"{stream}_mix" for stream in "rkvwg")}
    assert {name for name, decayed in labels.items() if not decayed} == {"scale", "bias"} | gates | shift


def test_every_mixer_is_among_them():
    """A new mixer, or a new setting of one, belongs into the configs above."""
    assert {kind for config in configs() for kind in config.layer_types} == {FULL_ATTENTION, *STUDENT_MIXERS}
    shared = {"expand_kv", "output_gate", "rope", "qkv_bias", "qk_norm", "gate_init", "decay_init"}
    own = {kind: {f.name for f in fields(mixer.Config)} - shared for kind, mixer in STUDENT_MIXERS.items()}
    assert own == {
        "gated_deltanet": {"conv_size"},
        "gla": {"decay_rank"},
        "deltanet": {"conv_size"},
        "kimi_delta": {"conv_size", "low_rank"},
        "fixed_decay": {"form"},
        "mamba2": {"ssm_conv_size", "head_norm"},
        "rwkv6": {"low_rank"},
        "rwkv7": {"low_rank"},
        "window_attention": {"window", "sinks"},
    }


def test_only_matrices_shrink():
    config = replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, mixer=MIXERS[0])
    rng = np.random.default_rng(0)
    specs = model_variables(config)
    params = jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(np.float32), specs, is_leaf=is_variable)
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
