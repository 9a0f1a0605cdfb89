"""Each filter against the rule written out token by token, in float64."""

import jax
import numpy as np
import pytest

from jaxhybrid.decoding.sampling import Sampling, choose, filtered, in_rows, penalized
from jaxhybrid.errors import ConfigError


@pytest.fixture(scope="module")
def logits():
    return 2 * np.random.default_rng(0).standard_normal((12, 40)).astype(np.float32)


def kept_by_rule(logits, s):
    """The tokens that stay, most likely first, as transformers' warpers choose them one after the other."""
    scaled = logits.astype(np.float64) / (s.temperature or 1)
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if s.top_k:
        order = order[: s.top_k]
    likely = np.exp(scaled[order] - scaled[order[0]])
    likely /= likely.sum()
    if s.top_p < 1:
        reached, count = 0.0, 0
        while reached < s.top_p:
            reached, count = reached + likely[count], count + 1
        order, likely = order[:count], likely[:count]
    return {token for token, p in zip(order, likely) if p >= s.min_p * likely[0]}


CASES = [
    Sampling(0.7),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=7),
    Sampling(1.0, top_k=400),
    Sampling(1.3, top_p=0.5),
    Sampling(0.8, top_p=0.93),
    Sampling(2.0, top_p=1e-6),
    Sampling(1.0, min_p=0.2),
    Sampling(0.5, min_p=1.0),
    Sampling(1.7, top_k=9, top_p=0.8),
    Sampling(0.9, top_k=12, min_p=0.1),
    Sampling(1.1, top_k=20, top_p=0.9, min_p=0.05),
]


def test_filters_keep_what_their_rules_keep(logits):
    """Rows with settings of their own in one program."""
    actual = np.asarray(jax.jit(filtered)(logits, in_rows(CASES)))
    sizes = set()
    for row, (setting, own) in enumerate(zip(CASES, logits)):
        kept = kept_by_rule(own, setting)
        sizes.add(len(kept))
        assert set(np.flatnonzero(np.isfinite(actual[row]))) == kept, setting
        np.testing.assert_allclose(actual[row][list(kept)], (own / setting.temperature)[list(kept)], rtol=1e-6)
    assert len(sizes) > 5


def test_tokens_as_likely_as_the_last_one_are_kept():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    for setting in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
        assert np.flatnonzero(np.isfinite(filtered(logits, in_rows([setting]))[0])).tolist() == [0, 1, 2]


def test_the_penalty_moves_tokens_that_occurred_towards_no(logits):
    seen = np.random.default_rng(1).random(logits.shape) < 0.3
    penalty = np.linspace(0.5, 2, len(logits), dtype=np.float32)
    expected = logits.copy()
    for row, token in zip(*np.nonzero(seen)):
        x = logits[row, token]
        expected[row, token] = x / penalty[row] if x > 0 else x * penalty[row]
    np.testing.assert_allclose(penalized(logits, penalty, seen), expected, rtol=1e-6)


def test_filters_and_penalty_are_those_of_transformers(logits):
    torch = pytest.importorskip("torch")
    from transformers import generation

    for setting, own in zip(CASES, logits):
        scores, ids = torch.tensor(own)[None], torch.zeros((1, 1), dtype=torch.long)
        chain = [generation.TemperatureLogitsWarper(setting.temperature)]
        if setting.top_k:
            chain.append(generation.TopKLogitsWarper(setting.top_k))
        chain += [generation.TopPLogitsWarper(setting.top_p), generation.MinPLogitsWarper(setting.min_p)]
        for warper in chain:
            scores = warper(ids, scores)
        ours = np.asarray(filtered(own[None], in_rows([setting])))
        np.testing.assert_allclose(ours, scores.numpy(), rtol=1e-5)
    prompt = [[3, 5, 3]]
    theirs = generation.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(prompt), torch.tensor(logits[:1]))
    seen = np.isin(np.arange(40), prompt)[None]
    np.testing.assert_allclose(penalized(logits[:1], np.array([1.3], np.float32), seen), theirs.numpy(), rtol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """And a greedy row beside them takes the most likely token. 1,000 draws: 4 standard errors are 0.064."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = 1000
    rows = in_rows([*(Sampling(1.0, top_k=3, seed=n) for n in range(draws)), Sampling(seed=3)])
    tokens = choose(np.tile(logits, (draws + 1, 1)), rows, np.zeros(draws + 1, np.int32), None, drawn=True)
    shares = np.bincount(tokens[:draws], minlength=4) / draws
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.064)
    assert shares[3] == 0
    assert tokens[draws] == 0


def test_noise_follows_seed_and_place():
    logits = np.zeros((4, 1000), np.float32)
    rows = in_rows([Sampling(1.0, seed=seed) for seed in (1, 1, 2, 1)])
    a, b, c, d = np.asarray(choose(logits, rows, np.array([5, 5, 5, 6], np.int32), None, drawn=True))
    assert a == b
    assert len({int(a), int(c), int(d)}) == 3


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_k": 2**31},
        {"top_p": 0},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value}: use"):
        Sampling(**setting)
