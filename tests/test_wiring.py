"""What each stage of a run starts from, learns from and is measured on: every first figure worked out again, plainly.

A stage that began with the wrong parameters, read the wrong text or counted the wrong tokens would still train, finish
and export; only its figures would be others.
"""

import shutil
from functools import partial

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxhybrid.data import HeldoutBatches, open_text, training_batches
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import Model, forward
from jaxhybrid.settings.read import load_config
from jaxhybrid.stages.align import linear_mixers
from jaxhybrid.weights.convert import convert, with_softmax_layers
from jaxhybrid.weights.huggingface import load_teacher
from tests.oracles import plain_alignment
from tests.runs import read, records, snapshot

F, G = FULL_ATTENTION, GatedDeltaNetConfig.kind
RTOL = 2e-4  # float32 programs of two forms


class Pieces:
    """The run's teacher, text and students, put together without its pipeline."""

    def __init__(self, run):
        self.run, self.config = run, load_config(run / "config.yaml")
        self.teacher = load_teacher(self.config.teacher)
        self.text = open_text(self.config.data, self.teacher.folder, self.teacher.config.vocab_size)
        key = jax.random.key(self.config.seed)
        self.converted = jax.jit(convert, static_argnums=(1, 2))(
            self.teacher, (G,) * 3, self.config.mixer.to_model(), key
        )
        self.aligned = self.with_mixers(self.trained("align"))

    def trained(self, stage):
        return jax.tree.map(np.asarray, ocp.load((self.run / stage / "params").absolute()))

    def with_mixers(self, mixers):
        return Model({**self.converted.params, "mixers": mixers}, self.converted.config)

    def hybrid(self, kept, params=None):
        types = tuple(F if layer in kept else G for layer in range(3))
        start = with_softmax_layers(self.aligned, self.teacher, types)
        return start if params is None else Model(params, start.config)

    def first_batch(self, stage, salt):
        settings = getattr(self.config, stage)
        seed = self.config.seed * 1000 + salt
        return next(training_batches(self.text.train, settings.sequence_length, settings.batch_size, seed))

    def heldout(self, stage):
        settings = getattr(self.config, stage)
        sizes = settings.sequence_length, settings.batch_size, settings.heldout_tokens
        return list(HeldoutBatches(self.text.heldout, *sizes))


@pytest.fixture(scope="module")
def pieces(whole):
    return Pieces(whole.run)


logits = jax.jit(forward)


def log_probabilities(model, batch):
    x = np.asarray(logits(model, batch["tokens"], batch["segment_ids"]), np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def mean_kl(teacher, student, rows):
    total, tokens = 0.0, 0
    for batch in rows:
        log_p, log_q = log_probabilities(teacher, batch), log_probabilities(student, batch)
        total += np.sum(np.sum(np.exp(log_p) * (log_p - log_q), -1) * (batch["segment_ids"] != 0))
        tokens += np.count_nonzero(batch["segment_ids"])
    return total / tokens


def cross_entropy(model, rows):
    total, predicted = 0.0, 0
    for batch in rows:
        ids, segments = batch["tokens"], batch["segment_ids"]
        chosen = np.take_along_axis(log_probabilities(model, batch)[:, :-1], ids[:, 1:, None], -1)[..., 0]
        mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        total, predicted = total - np.sum(chosen * mask), predicted + mask.sum()
    return total / predicted


def test_alignment_starts_from_the_converted_student(pieces):
    losses = partial(plain_alignment, teacher=pieces.teacher, config=pieces.converted.config)
    mixers, done = linear_mixers(pieces.converted.params), read(pieces.run / "align" / "done.json")
    first = records(pieces.run / "align")[0]
    np.testing.assert_allclose(first["layer_loss"], losses(mixers, batch=pieces.first_batch("align", 1)), rtol=RTOL)
    rows = pieces.config.align.batch_size
    heldout = HeldoutBatches(pieces.text.heldout, 64, rows, rows * 64)[0]
    np.testing.assert_allclose(done["heldout_layer_loss_before"], losses(mixers, batch=heldout), rtol=RTOL)
    trained = losses(pieces.trained("align"), batch=heldout)
    np.testing.assert_allclose(done["heldout_layer_loss_after"], trained, rtol=RTOL)


def test_candidates_start_from_the_aligned_student(pieces):
    """And their held-out KL is that of the held-out text, whose last row is padded."""
    heldout = pieces.heldout("score")
    assert any(np.any(batch["segment_ids"] == 0) for batch in heldout)
    for candidate in read(pieces.run / "scores.json")["candidates"]:
        expected = mean_kl(pieces.teacher, pieces.hybrid([candidate["layer"]]), heldout)
        assert candidate["heldout"][0] == [0, pytest.approx(expected, rel=RTOL)]


def test_distillation_starts_from_the_aligned_hybrid(pieces):
    kept = read(pieces.run / "layers.json")["softmax_layers"]
    expected = mean_kl(pieces.teacher, pieces.hybrid(kept), [pieces.first_batch("distill", 3)])
    assert records(pieces.run / "distill")[0]["loss"] == pytest.approx(expected, rel=RTOL)


def test_finetuning_starts_from_the_distilled_hybrid(pieces):
    kept = read(pieces.run / "layers.json")["softmax_layers"]
    distilled = pieces.hybrid(kept, pieces.trained("distill"))
    expected = cross_entropy(distilled, [pieces.first_batch("finetune", 4)])
    assert records(pieces.run / "finetune")[0]["loss"] == pytest.approx(expected, rel=RTOL)


def test_evaluation_is_of_each_model_on_the_held_out_text(pieces):
    kept = read(pieces.run / "layers.json")["softmax_layers"]
    models = {"teacher": pieces.teacher} | {
        stage: pieces.hybrid(kept, pieces.trained(stage)) for stage in ("distill", "finetune")
    }
    figures, heldout = read(pieces.run / "evaluation.json")["models"], pieces.heldout("evaluate")
    assert list(figures) == list(models)
    for name, model in models.items():
        assert np.log(figures[name]["perplexity"]) == pytest.approx(cross_entropy(model, heldout), rel=RTOL), name
        expected = mean_kl(pieces.teacher, model, heldout)
        assert figures[name]["kl"] == pytest.approx(expected, rel=RTOL, abs=1e-6), name


def test_no_held_out_document_is_trained_on(pieces):
    held, train = (
        {" ".join(map(str, data.document(i))) for i in range(len(data))}
        for data in (pieces.text.heldout, pieces.text.train)
    )
    assert held
    assert not held & train


def test_greedy_selection_is_of_aligned_hybrids_on_the_held_out_text(pieces, whole, tmp_path):
    """By the verb, after align alone: no scores are asked for."""
    run = tmp_path / "run"
    shutil.copytree(whole.run / "align", run / "align")
    sizes = "select.measure={tokens: 500, sequence_length: 64, batch_size: 8}"
    output = whole.finish("select", whole.config, f"run_dir={run}", "select.method=greedy_kl", "select.budget=2", sizes)
    layers, heldout = read(run / "layers.json"), list(HeldoutBatches(pieces.text.heldout, 64, 8, 500))
    kl = lambda kept: mean_kl(pieces.teacher, pieces.hybrid(kept), heldout)  # noqa: E731
    singles = {str(layer): kl([layer]) for layer in range(3)}
    start, first, second = layers["rounds"]
    assert start["kl"] == pytest.approx(kl([]), rel=RTOL)
    assert first["scores"] == pytest.approx(singles, rel=RTOL)
    assert str(first["layer"]) == min(singles, key=singles.get)
    assert second["kl"] == pytest.approx(kl(layers["softmax_layers"]), rel=RTOL)
    assert layers["other_budgets"] == {"1": [first["layer"]], "2": layers["softmax_layers"]}
    parameters = sum(x.size for x in jax.tree.leaves(pieces.teacher.params))
    tokens = 8 * 64 * (2 + 3 + 2)
    assert (layers["cost"]["forward_tokens"], layers["cost"]["flops"]) == (tokens, 2 * parameters * tokens)
    assert layers["provenance"]["measure"]["source"] == "heldout"
    assert f"select: keeps layer {first['layer']}:" in output
    before = snapshot(run / "select")
    changed = f"select.method=greedy_kl select.budget=2 {sizes.replace('tokens: 500', 'tokens: 400')}"
    assert f"keeps layer {first['layer']}:" not in whole.finish("select", run)  # every round is there
    assert snapshot(run / "select") == before
    refused = whole.start("select", whole.config, f"run_dir={run}", *changed.split(" ", 2))
    assert refused.returncode == 2
    assert "select.measure.tokens: 500 -> 400" in refused.stderr
