"""Likelihood and greedy tokens of answers, against logits of the whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.evaluate import answers as module
from jaxhybrid.evaluate.answers import NO_TOKEN, is_answer, read_answers
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, declare, forward

LENGTHS = [[3, 1], [2, 3], [1, 2], [3, 3], [1, 1]]  # of two answers in each of five rows
PLACES = np.array([[5, 20], [2, 12], [0, 28], [9, 15], [7, 9]])


@pytest.fixture(scope="module")
def expected(teacher):
    """Tokens, answers, their likelihood in float64, and the greedy tokens; every second answer is what greedy gives."""
    tokens = np.random.default_rng(0).integers(0, 61, (5, 32)).astype(np.int32)
    answers = np.full((5, 2, 3), NO_TOKEN, np.int32)
    run = jax.jit(lambda tokens: forward(teacher.params, teacher.config, tokens))
    for row, question, token in np.ndindex(answers.shape):
        if token < LENGTHS[row][question]:
            place = PLACES[row, question] + token
            if question:
                tokens[row, place + 1] = np.argmax(run(tokens)[row, place])
            answers[row, question, token] = tokens[row, place + 1]
    logits = np.asarray(run(tokens), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    likelihood, greedy = np.zeros((5, 2)), np.full_like(answers, NO_TOKEN)
    for row, question, token in zip(*np.nonzero(answers != NO_TOKEN)):
        at = log_p[row, PLACES[row, question] + token]
        likelihood[row, question] += at[answers[row, question, token]]
        greedy[row, question, token] = np.argmax(at)
    return tokens, answers, likelihood, greedy


@pytest.mark.parametrize("devices", [1, 4])
def test_answers_are_read_from_the_logits_at_their_places(teacher, expected, devices):
    tokens, answers, likelihood, greedy = expected
    model = teacher
    # Five rows fill neither one batch of four nor two of three.
    settings = {"rows": 3, "dtype": jnp.float32}
    if devices == 1:
        found = read_answers(model, tokens, PLACES, answers, **settings)
    else:
        mesh = make_mesh(2, 2, devices=jax.devices()[:4])
        with jax.set_mesh(mesh):
            params = jax.device_put(model.params, param_shardings(declare(model.config), mesh))
            found = read_answers(Model(params, model.config), tokens, PLACES, answers, **settings)
    np.testing.assert_allclose(found[0], likelihood, rtol=1e-5)
    np.testing.assert_array_equal(np.where(answers == NO_TOKEN, NO_TOKEN, found[1]), greedy)
    right = is_answer(found[1], answers)
    assert right[:, 1].all()
    assert not right[:, 0].any()


def test_logits_are_not_rounded_before_the_choice(teacher, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 100)  # of 512 places
    tokens = np.random.default_rng(0).integers(0, 61, (16, 32)).astype(np.int32)
    start, every = np.zeros((16, 1), np.int32), np.zeros((16, 1, 32), np.int32)
    _, chosen = read_answers(teacher, tokens, start, every, rows=16, dtype=jnp.bfloat16)
    logits = jax.jit(lambda tokens: forward(teacher.params, teacher.config, tokens, dtype=jnp.bfloat16))(tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(chosen[:, 0], jnp.argmax(logits, -1))
    assert (chosen[:, 0] != np.asarray(jnp.argmax(logits.astype(jnp.bfloat16), -1))).any()  # it would matter
