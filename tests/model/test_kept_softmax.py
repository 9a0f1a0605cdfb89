"""Softmax layers of a hybrid without rotary embedding and with queries scaled by length (HyPE)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxhybrid.errors import ConfigError
from jaxhybrid.export.folder import export
from jaxhybrid.families import config_to_hf
from jaxhybrid.model.attention import Attention
from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.config import SoftmaxConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import Model, forward, token_context
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_student
from tests.conftest import make_batch, make_teacher
from tests.decoding.conftest import in_small_chunks, recomputed

G, F = GatedDeltaNetConfig.kind, "full_attention"
HYPE = SoftmaxConfig(rope=False, length_scale=5.0)


@pytest.fixture(scope="module")
def student():
    teacher = make_teacher(num_layers=3)
    make = jax.jit(convert, static_argnums=(1, 2))
    hybrid = make(teacher, (G, F, G), GatedDeltaNetConfig(rope=True), jax.random.key(1))
    return Model(hybrid.params, replace(hybrid.config, softmax=HYPE))


def test_the_formula(student):
    """In packed rows: a token sees those of its document, whose order it can tell by nothing but causality."""
    config, batch = student.config, make_batch(61, length=12)
    segments = np.asarray(batch["segment_ids"])
    layer = bind(Attention, config, jax.tree.map(lambda w: w[0], student.params["mixers"][F]))
    x = jax.random.normal(jax.random.key(0), (*segments.shape, config.hidden_size))
    found, _ = layer(x, token_context(config, batch["tokens"], batch["segment_ids"], None))
    q, k, v = (np.asarray(proj(x), np.float64) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    k, v = (np.repeat(a, config.num_heads // config.num_kv_heads, axis=2) for a in (k, v))
    expected = np.zeros_like(q)
    for row, token in np.argwhere(segments != 0):
        seen = np.flatnonzero((segments[row] == segments[row, token]) & (np.arange(len(segments[row])) <= token))
        scale = np.log(len(seen) - 1 + 5.0) / np.log(5.0)
        scores = np.einsum("hk,mhk->hm", scale * q[row, token], k[row, seen]) / np.sqrt(config.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected[row, token] = np.einsum("hm,mhk->hk", weights, v[row, seen])
    real = (segments != 0)[..., None]
    np.testing.assert_allclose(found * real, layer.o_proj(jnp.asarray(expected, jnp.float32)) * real, atol=2e-5)


@pytest.mark.slow
def test_decoding(student, monkeypatch):
    prompts = [[3, 9, 4], [(7 * i + i * i) % 61 for i in range(19)]]
    assert in_small_chunks(monkeypatch, student, prompts, 8) == recomputed(student, prompts, 8)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_an_export_goes_out_and_comes_back(student, tmp_path):
    batch = make_batch(61, length=24)
    tokens, segments = (np.asarray(batch[name]) for name in ("tokens", "segment_ids"))
    told = []
    folder = export(student, tmp_path / "out", "float32", told=told.append)
    assert "rotary embedding of softmax layers" in told[0]
    card = (folder / "README.md").read_text()
    assert "A softmax layer has no rotary embedding and queries scaled by log(t + 5) / log(5) after t tokens." in card
    again = load_student(folder)
    assert again.config == student.config
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

    def logits(tokens, **given):
        with torch.no_grad():
            return theirs(torch.from_numpy(tokens), **given).logits.numpy()

    expected = forward(student, tokens)
    np.testing.assert_allclose(logits(tokens), expected, atol=2e-5)
    packed = logits(tokens, seq_idx=torch.from_numpy(segments), attention_mask=torch.from_numpy((segments != 0) * 1))
    real = (segments != 0)[..., None]
    np.testing.assert_allclose(packed * real, forward(student, tokens, segments) * real, atol=2e-5)
    for changes in ({"rope": True}, {"length_scale": None}):
        other = replace(student.config, softmax=replace(HYPE, **changes))
        assert np.abs(forward(Model(student.params, other), tokens) - expected).max() > 1e-3
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = theirs.generate(torch.from_numpy(tokens[:1, :9]), **options)[0, 9:].tolist()  # with a cache
    assert [answer] == recomputed(student, [tokens[0, :9].tolist()], 8)


def test_what_cannot_be_is_refused(student):
    with pytest.raises(ConfigError, match=r"softmax.length_scale=1.0: must be above 1"):
        SoftmaxConfig(length_scale=1.0)
    with pytest.raises(ConfigError, match=r"cannot have softmax=SoftmaxConfig\(rope=False"):
        config_to_hf(student.config)
