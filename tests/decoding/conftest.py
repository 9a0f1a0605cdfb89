from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.decoding import engine
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.model.transformer import forward
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher

G = GatedDeltaNetConfig.kind
PATTERNS = {"softmax": (F,) * 2, "linear": (G,) * 2, "hybrid": (G, F, G)}


def make_model(name, **changes):
    mixer = GatedDeltaNetConfig()
    if name == "conv":
        mixer = replace(mixer, conv_size=4, rope=True)
    if name == "grouped":
        mixer = replace(mixer, expand_kv=False)
    if name == "gla":
        mixer = GLAConfig()
    if name == "window":
        mixer = WindowAttentionConfig(window=5, sinks=2)
    pattern = tuple(mixer.kind if kind == G else kind for kind in PATTERNS.get(name, PATTERNS["hybrid"]))
    make = jax.jit(convert, static_argnums=(1, 2))
    student = make(make_teacher(num_layers=len(pattern), **changes), pattern, mixer, jax.random.key(2))
    if name == "conv":  # an identity convolution would hide a wrong state
        mixers = student.params["mixers"][G]
        taps = {name: {"taps": mixers[name]["taps"] + 0.3} for name in ("q_conv", "k_conv", "v_conv")}
        student.params["mixers"][G].update(taps)
    return student


@pytest.fixture(scope="module", params=["softmax", "linear", "hybrid", "conv", "grouped", "gla"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def hybrid():
    return make_model("conv")


def recomputed(model, prompts, steps, dtype=jnp.float32):
    """Greedy decoding with a whole forward pass per token, always over the same padded length."""
    run = jax.jit(lambda tokens, segments: forward(model, tokens, segments, dtype=dtype))
    texts = [list(prompt) for prompt in prompts]
    longest = max(map(len, texts)) + steps
    for _ in range(steps):
        rows, lengths = np.zeros((len(texts), longest), np.int32), np.array([len(text) for text in texts])
        for row, text in zip(rows, texts):
            row[: len(text)] = text
        logits = run(rows, (np.arange(longest) < lengths[:, None]).astype(np.int32))
        for number, text in enumerate(texts):
            text.append(int(np.argmax(logits[number, len(text) - 1])))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def in_small_chunks(monkeypatch, model, prompts, steps):
    """Greedy decoding by the engine, of prompts in chunks of 8 and then four tokens at a time."""
    monkeypatch.setattr(engine, "CAPACITY", 32)
    monkeypatch.setattr(engine, "CHUNK", (8, 8))
    slots, found = engine.Engine(model, len(prompts)), [[] for _ in prompts]
    slots.prefill({row: engine.Request(prompt, steps) for row, prompt in enumerate(prompts)})
    while slots.busy:
        for slot, tokens in slots.step(4).items():
            found[slot] += tokens
    return found
