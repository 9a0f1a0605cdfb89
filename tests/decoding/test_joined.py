"""Weights that are read together lie together: the same layers, and on a GPU few kernels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels.gpu.attention_token import attention_token

from jaxhybrid.decoding import engine
from jaxhybrid.decoding.engine import Engine, Request
from jaxhybrid.model import attention, decode
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.config import RopeConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.decode import Chunk, decode_token, embedded, initial_states, prefill_layer, unstack
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher

BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
PLAIN = GatedDeltaNetConfig()
H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"))


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    monkeypatch.setenv("JAXHYBRID_DECODE_KERNELS", "1")


def hybrid(mixer, **changes):
    """One layer of each kind, biases and norms away from their first values."""
    model = convert(make_teacher(num_layers=2, **changes), (mixer.kind, F), mixer, jax.random.key(1))
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return replace(model, params=jax.tree.unflatten(tree, noisy))


@pytest.mark.parametrize(
    ("mixer", "changes"),
    [
        (PLAIN, BIASES),
        (replace(PLAIN, conv_size=3, rope=True, output_gate=False), {"qk_norm": True}),
        (GLAConfig(qkv_bias=True), BIASES),
    ],
)
def test_joined_layers_equal_those_apart(mixer, changes, monkeypatch):
    """Logits and states after a prompt and a token, in float32."""
    model = hybrid(mixer, **changes)
    tokens, lengths = jnp.asarray([[3, 9, 4, 17], [8, 2, 1, 1]]), jnp.asarray([3, 2], jnp.int32)

    def run(model):
        own, states = unstack(model, jnp.float32), list(initial_states(model.config, 2, 8, jnp.float32))
        chunk, x = Chunk(jnp.int32(0), lengths, jnp.int32(4), None), embedded(own, tokens[:, :3])
        for layer, kind in enumerate(model.config.layer_types):
            x, states[layer] = prefill_layer(model.config, kind, own.layers[layer], x, states[layer], chunk)
        return decode_token(own, tokens[:, 3], tuple(states), lengths)

    joined = jax.jit(run)(model)
    monkeypatch.setattr(decode, "_join", lambda config, kind, layer: layer)
    apart = jax.jit(lambda model: run(model))(model)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(joined), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_softmax_layers_by_kernels_write_the_same(monkeypatch):
    """Greedy, in float32, of a text in the second part of its cache and one beside it; interpreted."""
    model = hybrid(PLAIN, hidden_size=64, head_dim=64, num_heads=6, num_kv_heads=2, attention_scale=0.2, **BIASES)
    monkeypatch.setattr(engine, "CAPACITY", 32)
    texts, calls = [[(7 * i + i * i) % 61 for i in range(45)], [3, 9, 4]], []

    def run():
        jax.clear_caches()
        slots, found = Engine(model, 2), [[], []]
        slots.prefill({row: Request(text, 8) for row, text in enumerate(texts)})
        while slots.busy:
            for slot, tokens in slots.step(8).items():
                found[slot] += tokens
        return found, slots.states

    def kernels(*given, **how):
        calls.append(given[3].shape[2])
        return attention_token(*given, **how)

    expected, plain = run()
    monkeypatch.setattr(attention, "on_nvidia", lambda: True)
    monkeypatch.setattr(attention, "attention_token", kernels)
    found, states = run()
    assert found == expected
    assert calls == [64]  # places in the cache, of one trace
    for name in "kv":
        own, theirs = (np.asarray(x[1][name][0, :, : 45 + 7]) for x in (states, plain))
        np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changed", "takes"),
    [
        ({}, True),
        ({"qk_norm": True}, False),
        ({"attention_cap": 30.0}, False),
        ({"window": WindowConfig(4, (1,))}, False),
        ({"softmax": SoftmaxConfig(rope=False)}, False),
        ({"rope": RopeConfig(partial=0.5)}, False),
    ],
)
def test_which_softmax_layers_the_kernels_take(changed, takes, monkeypatch):
    monkeypatch.setattr(attention, "on_nvidia", lambda: True)
    calls = []

    def recorded(*given, **how):
        calls.append(given)
        return attention_token(*given, **how)

    monkeypatch.setattr(attention, "attention_token", recorded)
    model = hybrid(PLAIN, hidden_size=64, head_dim=64, num_heads=1, num_kv_heads=1, **changed)
    own, states = unstack(model, jnp.float32), initial_states(model.config, 1, 32, jnp.float32)
    jax.eval_shape(decode_token, own, jnp.asarray([3]), states, jnp.asarray([4], jnp.int32))
    assert bool(calls) == takes


def test_layers_with_a_ring_of_keys_stay_apart():
    model = hybrid(WindowAttentionConfig(window=4, sinks=2))
    assert [decode.may_join(model.config, kind) for kind in model.config.layer_types] == [False, True]


def test_joined_weights_take_no_more_memory():
    model = hybrid(PLAIN)
    own = unstack(model, jnp.float32)
    held = sum(x.nbytes for x in jax.tree.leaves(own.layers))
    assert held == sum(x.nbytes for part in ("blocks", "mixers") for x in jax.tree.leaves(model.params[part]))


def test_one_text_on_a_gpu_takes_few_kernels():
    """Lowered for an H100: four products of each layer, its state or its attention in two. XLA has the head."""
    model = hybrid(PLAIN, hidden_size=128, intermediate_size=256, head_dim=64, num_heads=2, num_kv_heads=1)
    own, states = unstack(model, jnp.bfloat16), initial_states(model.config, 1, 32, jnp.bfloat16)
    step = jax.jit(lambda *given: decode_token(*given))  # not traced for the CPU before
    with jax.sharding.use_abstract_mesh(H100):
        exported = export.export(
            step, platforms=["cuda"], disabled_checks=[export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
        )
        text = exported(own, jnp.zeros(1, jnp.int32), states, jnp.zeros(1, jnp.int32)).mlir_module()
    linear, softmax, head = (4 + 1, 0), (4 + 2, 0), (0, 1)  # kernels, and XLA's products
    found = text.count("xla.gpu.triton"), text.count("stablehlo.dot_general")
    assert found == tuple(map(sum, zip(linear, softmax, head)))
    assert "log_plus_one" not in text  # the decay is the kernel's
