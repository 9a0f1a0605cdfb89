"""Slots, the state in them, and the programs that move it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.decoding import engine
from jaxhybrid.decoding.engine import Engine, Request, chunk_sizes, rounded
from jaxhybrid.decoding.generate import generate
from jaxhybrid.decoding.sampling import Sampling
from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import FULL_ATTENTION
from tests.decoding.conftest import make_model, recomputed

PROMPTS = [[3, 9, 4, 17, 2], [8], [(7 * i + i * i) % 61 for i in range(21)]]
PROGRAMS = ("_embedded", "_prefill_layer", "_steps", "_grown")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(engine, "CAPACITY", 32)


def compiled():
    return {name: getattr(engine, name)._cache_size() for name in PROGRAMS}


def finish(slots):
    """The rest of all texts that are in the slots."""
    found = {slot: [] for slot in slots.busy}
    while slots.busy:
        for slot, tokens in slots.step(4).items():
            found[slot] += tokens
    return found


WINDOW = pytest.param("window", marks=pytest.mark.slow)


@pytest.mark.parametrize("model", ["conv", "gla", WINDOW], indirect=True)
def test_a_prompt_in_chunks_gives_the_state_of_the_whole(model, monkeypatch):
    whole = Engine(model, 2)
    whole.prefill({0: Request(PROMPTS[2], 4), 1: Request(PROMPTS[0], 4)})
    monkeypatch.setattr(engine, "CHUNK", (8, 8))
    chunked = Engine(model, 2)
    chunked.prefill({0: Request(PROMPTS[2], 4), 1: Request(PROMPTS[0], 4)})
    lengths = np.array([len(PROMPTS[2]) - 1, len(PROMPTS[0]) - 1])
    for kind, a, b in zip(model.config.layer_types, whole.states, chunked.states):
        for name in a:
            ours, theirs = np.asarray(a[name]), np.asarray(b[name])
            if kind == FULL_ATTENTION:  # what is behind a prompt is never looked at
                held = np.arange(32) < lengths[:, None]
                ours, theirs = (np.where(held[:, None, :, None], x, 0) for x in (ours, theirs))
            assert np.abs(ours).max() > 0
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("model", ["conv", WINDOW], indirect=True)
def test_slots_are_filled_and_freed_while_others_run(model):
    """Two texts under way; one is stopped, its slot and an empty one get new prompts, the other text never notices."""
    expected = recomputed(model, [*PROMPTS, PROMPTS[0] + [1]], 12)
    slots = Engine(model, 4)
    slots.prefill({0: Request(PROMPTS[0], 12), 2: Request(PROMPTS[2], 12)})
    first = slots.step(4)
    assert first == {0: expected[0][:4], 2: expected[2][:4]}
    slots.stop(2)
    assert slots.idle == [1, 2, 3]
    slots.prefill({2: Request(PROMPTS[1], 12), 3: Request([*PROMPTS[0], 1], 12)})
    rest = finish(slots)
    assert (first[0] + rest[0], rest[2], rest[3]) == (expected[0], expected[1], expected[3])
    assert slots.idle == [0, 1, 2, 3]
    assert slots.step() == {}


def test_a_row_of_bfloat16_beside_others_is_near_itself_alone(hybrid):
    """Logits alone and in a batch of four differ by less than two steps of bfloat16's 8 bits."""
    own = engine.decode.unstack(hybrid, jnp.bfloat16)
    step = jax.jit(engine.decode.decode_token)
    logits = []
    for rows in (1, 4):
        slots = Engine(hybrid, rows, dtype=jnp.bfloat16)
        slots.prefill({row: Request([(row + 3 * t) % 61 for t in range(9)], 4) for row in range(rows)})
        lengths = np.full(rows, 8, np.int32)
        logits.append(np.asarray(step(own, (24 + lengths * 0) % 61, slots.states, lengths)[0])[0])
    assert np.abs(logits[0] - logits[1]).max() <= 2 * 2.0**-8 * np.abs(logits[0]).max()


def test_a_busy_or_foreign_slot_is_refused(hybrid):
    slots = Engine(hybrid, 2)
    slots.texts[0] = [1, 2]
    for slot in (0, 2):
        with pytest.raises(ConfigError, match=rf"Slot {slot} is busy or does not exist; idle are \[1\]"):
            slots.prefill({slot: Request([3], 4)})
    with pytest.raises(ConfigError, match="slots=0"):
        Engine(hybrid, 0)


def test_a_call_for_no_tokens_is_refused_and_harms_nothing(hybrid):
    slots = Engine(hybrid, 1)
    slots.prefill({0: Request(PROMPTS[0], 4)})
    for steps in (0, -1):
        with pytest.raises(ConfigError, match=f"steps={steps}: a call makes at least 1 token"):
            slots.step(steps)
    assert finish(slots) == {0: recomputed(hybrid, [PROMPTS[0]], 4)[0]}


def test_an_engine_can_take_the_weights(hybrid):
    model = type(hybrid)(jax.tree.map(jnp.copy, hybrid.params), hybrid.config)
    slots = Engine(model, 1, consume=True)
    assert all(x.is_deleted() for part in ("blocks", "mixers") for x in jax.tree.leaves(model.params[part]))
    slots.prefill({0: Request(PROMPTS[0], 4)})
    assert list(finish(slots)[0]) == recomputed(hybrid, PROMPTS[:1], 4)[0]


def test_few_programs_serve_all_lengths_and_settings():
    """For chunks of 32 tokens, caches of 32 places: one for each kind of layer; greedy steps and drawn ones."""
    hybrid, before = make_model("hybrid", vocab_size=67), compiled()  # of a size that no other test has
    for number, (length, new, temperature) in enumerate(
        [(3, 2, 0.0), (9, 8, 0.5), (14, 5, 1.0), (17, 7, 2.0), (12, 3, 0.3), (1, 6, 0.0), (16, 1, 9.0), (5, 8, 1.5)]
    ):
        filters = {"top_k": number, "top_p": 1 - number / 20, "eos_ids": range(number)}
        prompts = [[(number + t) % 61 for t in range(length)], [1]]
        generate(hybrid, prompts, new, temperature=temperature, seed=number, **filters)
    made = {name: count - before[name] for name, count in compiled().items()}
    assert made == {"_embedded": 1, "_prefill_layer": 2, "_steps": 2, "_grown": 0}


def test_sizes_come_in_steps():
    assert [rounded(n) for n in (1, 2, 3, 4, 5, 7, 33, 49, 1000, 1500)] == [1, 2, 3, 4, 6, 8, 48, 64, 1024, 1536]
    assert all(least <= rounded(least) < 1.5 * least for least in range(2, 3000))
    assert chunk_sizes(0, 1) == [32]
    assert chunk_sizes(17, 1) == [32]
    assert chunk_sizes(5000, 1) == [2048, 2048, 1024]
    assert chunk_sizes(5000, 64)[:2] == [256, 256]
    assert chunk_sizes(300, 1000) == [64] * 4 + [64]
    assert chunk_sizes(4096, 1) == [2048, 2048]


def lowered(slots, steps=4, drawn=False):
    settings = [Sampling()] * slots.slots
    rows = slots._rows(dict.fromkeys(slots.busy, 4), settings)
    return engine._steps.lower(slots.model, slots.states, rows, steps=steps, drawn=drawn).compile()


def test_a_step_writes_the_state_in_place_and_copies_no_cache_and_no_weight():
    slots = Engine(make_model("conv", tie_embeddings=True), 2)
    slots.prefill({0: Request(PROMPTS[0], 4), 1: Request(PROMPTS[1], 4)})
    program = lowered(slots)
    held = sum(x.nbytes for x in jax.tree.leaves(slots.states))
    assert program.memory_analysis().alias_size_in_bytes == held
    arrays = jax.tree.leaves((slots.states, slots.model))
    convolution = 2, 3, 32  # its last inputs move up
    sizes = {tuple(sorted(x.shape)) for x in arrays if x.size >= 128 and x.shape != convolution}
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|slice|dynamic-slice|transpose|concatenate)\(", program.as_text())
    assert moved
    assert not sizes & {tuple(sorted(map(int, shape.split(",")))) for shape in moved}


def test_a_chunk_writes_the_state_in_place(hybrid):
    slots = Engine(hybrid, 2)
    slots.prefill({0: Request(PROMPTS[0], 4)})
    chunk = engine.Chunk(np.int32(0), np.array([5, 0], np.int32), np.int32(6), None)
    x = jnp.zeros((2, 16, 32))
    for kind, weights, state in zip(hybrid.config.layer_types, slots.model.layers, slots.states):
        program = engine._prefill_layer.lower(hybrid.config, kind, weights, x, state, chunk).compile()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert program.memory_analysis().alias_size_in_bytes == held
