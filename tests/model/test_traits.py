"""A model that is otherwise than Llama in everything: on a mesh, as one module and in decoding it is the same model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.config import ExpertsConfig, RopeConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.decode import decode_token, initial_states, unstack
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.module import module
from jaxhybrid.model.partition import batch_sharding, make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, forward
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.decoding.conftest import in_small_chunks, recomputed

TRAITS = {
    "num_layers": 4,
    "rope": RopeConfig(partial=0.5),
    "qk_norm": True,
    "wide_qk_norm": True,
    "activation": "gelu_tanh",
    "experts": ExpertsConfig(6, 2, 24, normalise=True),
    "norms": "around",
    "norm_offset": True,
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logit_scale": 0.25,
    "logit_cap": 0.05,
    "attention_scale": 0.2,
    "attention_cap": 1.0,
    "window": WindowConfig(5, (0, 1, 3), RopeConfig(theta=100.0, partial=0.5)),
    "unrotated_layers": (2,),
    "softmax": SoftmaxConfig(length_scale=4.0),
}
G, F = GatedDeltaNetConfig.kind, "full_attention"


@pytest.fixture(scope="module")
def student():
    """Kept: a sliding layer, and one that is neither sliding nor rotated."""
    teacher = make_teacher(**TRAITS)
    make = jax.jit(convert, static_argnums=(1, 2))
    return make(teacher, (G, F, F, G), GatedDeltaNetConfig(rope=True), jax.random.key(1))


@pytest.fixture(scope="module")
def expected(student):
    batch = make_batch(61, length=24)
    return batch, jax.jit(forward)(student, batch["tokens"], batch["segment_ids"])


@pytest.mark.slow
def test_each_trait_matters(student, expected):
    batch, whole = expected
    for name, value in {
        "window": None, "unrotated_layers": (), "attention_scale": None, "attention_cap": None, "logit_cap": None,
        "softmax": SoftmaxConfig(),
    }.items():  # fmt: skip
        other = Model(student.params, replace(student.config, **{name: value}))
        assert np.abs(jax.jit(forward)(other, batch["tokens"], batch["segment_ids"]) - whole).max() > 1e-3, name


@pytest.mark.slow
def test_split_over_a_mesh(student, expected):
    """Rows, heads (key heads fewer than devices have shares), and weights; windows reach over the parts of a row."""
    batch, whole = expected
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(student.params, param_shardings(student.declared, mesh))
        placed = jax.device_put(batch, batch_sharding(mesh))
        logits = jax.jit(forward)(Model(params, student.config), placed["tokens"], placed["segment_ids"])
    np.testing.assert_allclose(np.asarray(logits), whole, atol=2e-4)


def test_as_one_module(student, expected):
    batch, whole = expected
    logits, _ = module(student)(batch["tokens"], segment_ids=batch["segment_ids"])
    np.testing.assert_allclose(logits, whole, atol=2e-4)


def test_logits_of_a_decoded_token(student, expected):
    """The first of each row: all that is before and after the layers, which greedy tokens do not show."""
    batch, whole = expected
    rows = batch["tokens"].shape[0]
    states = initial_states(student.config, rows, 8, jnp.float32)
    places = jnp.zeros(rows, jnp.int32)
    logits, _ = jax.jit(decode_token)(unstack(student, jnp.float32), batch["tokens"][:, 0], states, places)
    np.testing.assert_allclose(logits, whole[:, 0], atol=1e-5)


def test_decoding(student, monkeypatch):
    """Prompts longer and shorter than a window, in chunks; then token by token beyond it."""
    prompts = [[3, 9, 4], [(7 * i + i * i) % 61 for i in range(19)]]
    assert in_small_chunks(monkeypatch, student, prompts, 8) == recomputed(student, prompts, 8)
