"""Weights that are read together lie together: the same layers, and on a GPU few kernels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from jaxhybrid.model import decode
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.decode import Chunk, decode_token, embedded, initial_states, prefill_layer, unstack
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
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


def test_joined_weights_take_no_more_memory():
    model = hybrid(PLAIN)
    own = unstack(model, jnp.float32)
    held = sum(x.nbytes for x in jax.tree.leaves(own.layers))
    assert held == sum(x.nbytes for part in ("blocks", "mixers") for x in jax.tree.leaves(model.params[part]))


def test_one_text_on_a_gpu_takes_few_kernels():
    """Lowered for an H100: four products of each layer, and the state. XLA has softmax attention and the head."""
    model = hybrid(PLAIN, hidden_size=128, intermediate_size=256, head_dim=64, num_heads=2, num_kv_heads=1)
    own, states = unstack(model, jnp.bfloat16), initial_states(model.config, 1, 32, jnp.bfloat16)
    step = jax.jit(lambda *given: decode_token(*given))  # not traced for the CPU before
    with jax.sharding.use_abstract_mesh(H100):
        exported = export.export(
            step, platforms=["cuda"], disabled_checks=[export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
        )
        text = exported(own, jnp.zeros(1, jnp.int32), states, jnp.zeros(1, jnp.int32)).mlir_module()
    linear, softmax, head = (4 + 1, 0), (4, 2), (0, 1)  # kernels, and XLA's products
    found = text.count("xla.gpu.triton"), text.count("stablehlo.dot_general")
    assert found == tuple(map(sum, zip(linear, softmax, head)))
    assert "log_plus_one" not in text  # the decay is the kernel's
