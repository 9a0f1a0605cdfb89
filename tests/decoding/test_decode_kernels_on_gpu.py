"""Decoding by its own kernels on a card, by `make test-gpu`: the states that forced tokens leave, against a whole pass
over them in float32 and beside what XLA's programs leave."""

from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.decoding.engine import Engine, Request
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.weights.convert import convert

pytestmark = pytest.mark.gpu
# Of Qwen2.5-1.5B, but for depth and vocabulary.
SHAPE = ModelConfig(
    "qwen2", vocab_size=4096, hidden_size=1536, intermediate_size=8960, num_layers=4, num_heads=12, num_kv_heads=2,
    head_dim=128, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6, max_position_embeddings=131072,
)  # fmt: skip


def hybrid(kind):
    mixer = LINEAR_MIXERS[kind].Config()

    def make(key):
        model = Model(random_params(SHAPE, key), SHAPE)
        return convert(model, (kind, FULL_ATTENTION, kind, FULL_ATTENTION), mixer, key).cast(jnp.bfloat16)

    return jax.jit(make)(jax.random.key(0))


@contextmanager
def kernels(monkeypatch, on):
    monkeypatch.setenv("JAXHYBRID_DECODE_KERNELS", str(int(on)))
    jax.clear_caches()
    yield
    jax.clear_caches()


def forced(model, texts, places):
    """States after reading four tokens of each text as a prompt and the others one by one, as they are given."""
    engine = Engine(model, len(texts), dtype=jnp.bfloat16)
    engine.reserve(places)
    rows, length = texts.shape
    engine.prefill({row: Request(text[:4].tolist(), length) for row, text in enumerate(texts)})
    for place in range(4, length):
        engine.step(1)
        for row in range(rows):
            engine.texts[row][-1] = int(texts[row, place])
    engine.step(1)
    return states(engine, length), launched(engine)


def states(engine, length):
    """By layer and name, without the caches' empty places."""
    found = {}
    for layer, (state, kind) in enumerate(zip(engine.states, engine.model.config.layer_types)):
        for name, x in state.items():
            cut = x[:, :, :length] if kind == FULL_ATTENTION else x
            found[f"{layer} {kind} {name}"] = np.asarray(cut, np.float64)
    return found


def launched(engine):
    """Whether one of the decode kernels is in the step's program."""
    from jaxhybrid.decoding import engine as programs

    engine.texts = {0: [1, 2]}
    engine.requests = {0: Request([1], 8)}
    rows = engine._rows({0: 4}, [programs.GREEDY] * engine.slots)
    return "triton" in programs._steps.lower(engine.model, engine.states, rows, steps=1, drawn=False).as_text()


@pytest.mark.parametrize(
    ("kind", "rows", "places"),
    [("gated_deltanet", 1, 256), ("gated_deltanet", 4, 256), ("gated_deltanet", 2, 32768), ("gla", 1, 256)],
)
def test_forced_tokens_leave_the_states_of_a_whole_pass(monkeypatch, kind, rows, places):
    model = hybrid(kind)
    texts = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (rows, 70))
    with kernels(monkeypatch, False):
        whole = Engine(replace(model, params=model.cast(jnp.float32).params), rows, dtype=jnp.float32)
        whole.prefill({row: Request([*text.tolist(), 1], 8) for row, text in enumerate(texts)})
        expected = states(whole, texts.shape[1])
        plain, plain_kernels = forced(model, texts, places)
    with kernels(monkeypatch, True):
        own, own_kernels = forced(model, texts, places)
    assert (plain_kernels, own_kernels) == (False, True)
    told = {}
    for name, x in expected.items():
        errors = [np.linalg.norm(found[name] - x) / max(np.linalg.norm(x), 1e-30) for found in (plain, own)]
        told[name] = [float(f"{error:.2g}") for error in errors]
    print(kind, rows, places, told)
    for name, (theirs, ours) in told.items():
        assert ours < max(1.25 * theirs, 4e-3), (name, told)  # not so where it is no number
