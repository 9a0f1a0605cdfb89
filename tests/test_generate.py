"""Cached generation on the hybrid state against full recomputation, batched against single."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import DataError
from jaxhybrid.generate import generate
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.config import GATED_DELTANET as G
from jaxhybrid.model.config import GatedDeltaNetConfig
from jaxhybrid.model.decode import decode, initial_decode_state
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import declare, forward
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher

PROMPTS = [[3, 9, 4, 17, 2], [8], [5, 6, 7, 11, 30, 31, 32, 40]]
BUCKET = {"length_multiple": 8}  # prompts of one padded length share a program
PATTERNS = {"softmax": (F,) * 2, "linear": (G,) * 2, "hybrid": (G, F, G)}


@pytest.fixture(scope="module", params=["softmax", "linear", "hybrid", "conv", "grouped"])
def model(request):
    mixer = GatedDeltaNetConfig()
    if request.param == "conv":
        mixer = replace(mixer, conv_size=4, rope=True)
    if request.param == "grouped":
        mixer = replace(mixer, expand_kv=False)
    pattern = PATTERNS.get(request.param, PATTERNS["hybrid"])
    make = jax.jit(convert, static_argnums=(1, 2))
    student = make(make_teacher(num_layers=len(pattern)), pattern, mixer, jax.random.key(2))
    if request.param == "conv":  # an identity convolution would hide a wrong state
        taps = {name: w + 0.3 for name, w in student.params["mixers"][G].items() if name.endswith("_conv")}
        student.params["mixers"][G].update(taps)
    return student


def recomputed(model, prompts, steps):
    """Greedy decoding with a whole forward pass per token, always over the same padded length."""
    run = jax.jit(lambda tokens, segments: forward(model.params, model.config, tokens, segments))
    texts = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        rows, lengths = np.zeros((len(texts), 16), np.int32), np.array([len(text) for text in texts])
        for row, text in zip(rows, texts):
            row[: len(text)] = text
        logits = run(rows, (np.arange(16) < lengths[:, None]).astype(np.int32))
        for number, text in enumerate(texts):
            text.append(int(np.argmax(logits[number, len(text) - 1])))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def test_greedy_equals_full_recomputation_and_batched_equals_single(model):
    batched = generate(model, PROMPTS, 6, **BUCKET)
    expected = recomputed(model, PROMPTS, 6)
    for prompt, produced, wanted in zip(PROMPTS, batched, expected):
        assert produced == wanted
        assert produced == generate(model, [prompt], 6, **BUCKET)[0]


def test_prefill_then_tokens_equals_prefill_of_all(model):
    tokens = jnp.array([[3, 9, 4, 17, 2, 8, 1]], jnp.int32)
    step = jax.jit(partial(decode, model.params, model.config))
    whole, _ = step(tokens, initial_decode_state(model.config, 1, 8))
    logits, state = step(tokens[:, :3], initial_decode_state(model.config, 1, 8))
    logits, state = step(tokens[:, 3:5], state)
    for i in (5, 6):
        logits, state = step(tokens[:, i : i + 1], state)
    np.testing.assert_allclose(logits, whole, atol=1e-4)


@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_a_padded_length_changes_nothing(model):
    assert generate(model, PROMPTS, 6) == generate(model, PROMPTS, 6, length_multiple=16)


@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_stops_at_an_end_token(model):
    free = generate(model, PROMPTS[:1], 6, **BUCKET)[0]
    assert generate(model, PROMPTS[:1], 6, eos_ids=[free[2]], **BUCKET)[0] == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_prompts_split_over_devices_are_sampled_alike(model):
    alone = generate(model, PROMPTS, 4, temperature=2.0, **BUCKET)
    mesh = make_mesh(1, 2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = jax.device_put(model.params, param_shardings(declare(model.config), mesh))
        assert generate(replace(model, params=params), PROMPTS, 4, temperature=2.0, **BUCKET) == alone


@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_sampling_is_seeded(model):
    draws = [generate(model, PROMPTS[:1], 6, temperature=5.0, seed=seed, **BUCKET)[0] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_empty_prompt_and_foreign_token_are_refused(model):
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        generate(model, [[1], []], 2)
    with pytest.raises(DataError, match="token 99; the vocabulary has 61"):
        generate(model, [[99]], 2)
    with pytest.raises(DataError, match="token -1; the vocabulary has 61"):
        generate(model, [[3, -1]], 2)
    assert generate(model, [], 2) == []
