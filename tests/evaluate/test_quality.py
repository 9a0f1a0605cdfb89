"""Perplexity and KL against plain numpy on the logits: padded and packed rows, two models with heads of their own."""

import jax
import numpy as np
import pytest

from jaxhybrid.errors import DataError
from jaxhybrid.evaluate.quality import evaluate_quality
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model, forward
from tests.conftest import make_batch, make_teacher


def log_probabilities(model, batch):
    logits = np.asarray(forward(model, batch["tokens"], batch["segment_ids"]), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(model, teacher, batches):
    kl, tokens, nll, teacher_nll, predicted = 0.0, 0, 0.0, 0.0, 0
    for batch in batches:
        log_q, log_p = log_probabilities(model, batch), log_probabilities(teacher, batch)
        ids, segments = batch["tokens"], batch["segment_ids"]
        for row, at in np.argwhere(segments):
            tokens += 1
            kl += np.sum(np.exp(log_p[row, at]) * (log_p[row, at] - log_q[row, at]))
            if at + 1 < ids.shape[1] and segments[row, at + 1] == segments[row, at]:
                predicted += 1
                nll -= log_q[row, at, ids[row, at + 1]]
                teacher_nll -= log_p[row, at, ids[row, at + 1]]
    return {
        "perplexity": np.exp(nll / predicted),
        "teacher_perplexity": np.exp(teacher_nll / predicted),
        "kl": kl / tokens,
        "tokens": tokens,
    }


def test_figures_equal_plain_numpy():
    teacher = make_teacher(num_layers=1, vocab_size=29)
    student = Model(jax.tree.map(lambda x: 0.5 * x, teacher.params), teacher.config)
    batches = [make_batch(29, batch=2, seed=seed) for seed in range(3)]
    batches[1]["segment_ids"][1] = 0  # a row of padding, as the last batch of a held-out text may have
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        own, other = (
            Model(jax.device_put(m.params, jax.NamedSharding(mesh, jax.P())), m.config) for m in (student, teacher)
        )
        figures = evaluate_quality(own, other, batches, mesh, np.float32)
        with pytest.raises(DataError, match="no token to predict"):
            evaluate_quality(own, other, [], mesh, np.float32)
    assert figures == pytest.approx(by_hand(student, teacher, batches), rel=1e-4)
    assert figures["kl"] > 1e-3
