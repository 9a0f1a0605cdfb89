"""The table of weight names: complete for every model there can be, and each layout its own inverse."""

import itertools

import numpy as np
import pytest

from jaxhybrid.model.blueprint import count_parameters
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.weights.names import FOLDED, SAME, TAPS, file_tensors, linear

LAYOUTS = {
    "linear": (linear(), (6, 5), (5, 6)),
    "heads out": (linear(), (6, 3, 4), (12, 6)),
    "heads in": (linear(inputs=2), (3, 4, 6), (6, 12)),
    "same": (SAME, (7,), (7,)),
    "folded": (FOLDED, (3, 4), (12,)),
    "taps": (TAPS, (4, 3, 2), (6, 1, 4)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_inverses(name):
    layout, ours, stored = LAYOUTS[name]
    assert layout.file_shape(ours) == stored
    x = np.arange(np.prod(ours)).reshape(ours)
    assert layout.to_file(x).shape == stored
    np.testing.assert_array_equal(layout.from_file(layout.to_file(x), ours), x)
    y = np.arange(np.prod(stored)).reshape(stored)
    assert layout.from_file(y, ours).shape == ours
    np.testing.assert_array_equal(layout.to_file(layout.from_file(y, ours)), y)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reading_a_layout_copies_nothing(name):
    layout, ours, stored = LAYOUTS[name]
    y = np.zeros(stored)
    assert np.shares_memory(layout.from_file(y, ours), y)


def test_what_a_projection_computes():
    """The file's y = W x, head by head, is our einsum."""
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(12, 6)), rng.normal(size=6)
    ours = linear().from_file(weight, (6, 3, 4))
    np.testing.assert_allclose(np.einsum("d,dhk->hk", x, ours), (weight @ x).reshape(3, 4))
    weight, heads = rng.normal(size=(6, 12)), rng.normal(size=(3, 4))
    ours = linear(inputs=2).from_file(weight, (3, 4, 6))
    np.testing.assert_allclose(np.einsum("hk,hkd->d", heads, ours), weight @ heads.reshape(12))


@pytest.mark.parametrize("kinds", itertools.product([FULL_ATTENTION, GatedDeltaNetConfig.kind], repeat=3))
@pytest.mark.parametrize("everything", [False, True])
def test_every_number_has_one_place(kinds, everything):
    flag = everything
    mixer = GatedDeltaNetConfig(
        expand_kv=not flag, output_gate=flag, conv_size=4 * flag, qkv_bias=flag, qk_norm=flag
    )  # fmt: skip
    config = ModelConfig(
        "llama", 53, 32, 40, 3, 4, 2, 6, 1e-5, 64, tie_embeddings=flag, qkv_bias=flag, o_bias=flag, mlp_bias=flag,
        qk_norm=flag, layer_types=kinds, mixer=mixer,
    )  # fmt: skip
    tensors = file_tensors(config)
    assert len({tensor.name for tensor in tensors}) == len({(t.path, t.rows) for t in tensors}) == len(tensors)
    assert sum(int(np.prod(tensor.file_shape)) for tensor in tensors) == count_parameters(model_variables(config))
    for layer, kind in enumerate(kinds):
        prefix = "self_attn." if kind == FULL_ATTENTION else "linear_attn."
        found = [t for t in tensors if t.name.startswith(f"model.layers.{layer}.{prefix}")]
        assert {t.path[1] for t in found} == {kind}
        assert {t.rows for t in found} == {(kinds[:layer].count(kind),)}
    assert ("lm_head.weight" in {t.name for t in tensors}) is not flag
