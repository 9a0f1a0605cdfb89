"""Answers against full recomputation, batched against single, on one device and on a mesh."""

import math
from dataclasses import replace

import jax
import pytest

from jaxhybrid.decoding import engine
from jaxhybrid.decoding.engine import Engine, Request
from jaxhybrid.decoding.generate import generate
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import model_variables
from tests.decoding.conftest import recomputed

LONG = [(7 * i + i * i) % 61 for i in range(21)]
PROMPTS = [[3, 9, 4, 17, 2], [8], LONG]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of at most 8 tokens."""
    monkeypatch.setattr(engine, "CHUNK", (8, 8))
    monkeypatch.setattr(engine, "CAPACITY", 32)


def test_greedy_equals_full_recomputation_and_alone_equals_together(model):
    """A prompt of three chunks, one of one token, one that ends inside a chunk."""
    expected = recomputed(model, PROMPTS, 6)
    assert generate(model, PROMPTS, 6) == expected
    slots = Engine(model, 4)  # the same programs, with nothing in the other slots
    for number, prompt in enumerate(PROMPTS):
        slots.prefill({number: Request(prompt, 6)})
        assert slots.step() == {number: expected[number]}


def test_a_batch_of_one_gives_the_same(hybrid):
    together = generate(hybrid, PROMPTS, 6)
    assert [generate(hybrid, [prompt], 6)[0] for prompt in PROMPTS] == together


def test_a_long_answer_through_growing_caches_equals_recomputation(hybrid, monkeypatch):
    monkeypatch.setattr(engine, "CAPACITY", 16)
    assert generate(hybrid, PROMPTS[:1], 41) == recomputed(hybrid, PROMPTS[:1], 41)


def test_stops_at_an_end_token(hybrid):
    free = generate(hybrid, PROMPTS[:1], 6)[0]
    end = free.index(free[2]) + 1
    assert generate(hybrid, PROMPTS[:1], 6, eos_ids=[60, free[2]]) == [free[:end]]
    many = [*range(100, 120), free[2]]  # more than there is room for at first
    assert generate(hybrid, PROMPTS[:1], 6, eos_ids=many) == [free[:end]]


def test_a_drawn_answer_follows_its_seed_alone(hybrid):
    settings = {"temperature": 5.0, "top_k": 50, "top_p": 0.95}
    together = generate(hybrid, PROMPTS, 6, seed=1, **settings)
    for number, prompt in enumerate(PROMPTS):
        assert generate(hybrid, [prompt], 6, seed=1 + number, **settings) == [together[number]]
    assert generate(hybrid, PROMPTS, 6, seed=7, **settings) != together
    twice = generate(hybrid, [LONG, LONG], 6, seed=1, **settings)
    assert twice[0] != twice[1]


def test_a_penalty_keeps_tokens_from_coming_again(hybrid):
    free = generate(hybrid, PROMPTS, 12)
    assert any(len(set(answer)) < len(answer) for answer in free)
    kept = generate(hybrid, PROMPTS, 12, repetition_penalty=1e6)
    for prompt, answer in zip(PROMPTS, kept):
        assert len({*prompt, *answer}) == len(set(prompt)) + len(answer)


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), pytest.param((2, 1, 1, 2), marks=pytest.mark.slow)])
def test_a_model_split_over_devices_gives_the_same(hybrid, shape):
    settings = {"temperature": 2.0, "top_p": 0.9}
    expected = generate(hybrid, PROMPTS, 8, **settings)
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        params = jax.device_put(hybrid.params, param_shardings(model_variables(hybrid.config), mesh))
        model = replace(hybrid, params=params)
        assert generate(model, PROMPTS, 8, **settings) == expected


def test_what_cannot_be_answered_is_refused(hybrid):
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        generate(hybrid, [[1], []], 2)
    with pytest.raises(DataError, match="token 99; the vocabulary has 61"):
        generate(hybrid, [[99]], 2)
    with pytest.raises(DataError, match="token -1; the vocabulary has 61"):
        generate(hybrid, [[3, -1]], 2)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate(hybrid, [[3]], 0)
    with pytest.raises(ConfigError, match=r"top_p=1\.5: use a probability"):
        generate(hybrid, [[3]], 2, top_p=1.5)
    assert generate(hybrid, [], 2) == []
