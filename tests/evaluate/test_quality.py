"""Figures on held-out text against plain numpy on the logits: padded and packed rows, two models, several meshes."""

import jax
import numpy as np
import pytest

from jaxhybrid.errors import DataError
from jaxhybrid.evaluate.quality import compare_quality, position_edges
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, forward, model_variables
from tests.conftest import make_batch, make_teacher

FIGURES = {  # what is divided by what
    "perplexity": ("cross_entropy", "predicted"),
    "kl": ("kl", "tokens"),
    "kl_reverse": ("kl_reverse", "tokens"),
    "agreement": ("agreement", "tokens"),
}


@pytest.fixture(scope="module")
def pair():
    teacher = make_teacher(num_layers=1, vocab_size=29)
    sharper = {"head": {"kernel": 40 * teacher.params["head"]["kernel"]}}
    teacher = Model(teacher.params | sharper, teacher.config)
    return teacher, Model(jax.tree.map(lambda x: 0.5 * x, teacher.params), teacher.config)


@pytest.fixture(scope="module")
def batches():
    found = [make_batch(29, batch=4, length=80, seed=seed) for seed in range(2)]
    found[1]["segment_ids"][1] = 0  # a row of padding, as the last batch of a held-out text may have
    return found


def log_probabilities(model, batch):
    logits = np.asarray(forward(model, batch["tokens"], batch["segment_ids"]), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(model, teacher, batches):
    """Token by token: position in its document -> sums of what FIGURES divide."""
    found = {}
    for batch in batches:
        log_q, log_p = log_probabilities(model, batch), log_probabilities(teacher, batch)
        ids, segments = batch["tokens"], batch["segment_ids"]
        for row, at in np.argwhere(segments):
            position = int((segments[row, :at] == segments[row, at]).sum())
            sums = found.setdefault(position, dict.fromkeys(sum(FIGURES.values(), ()), 0.0))
            q, p = log_q[row, at], log_p[row, at]
            sums["tokens"] += 1
            sums["kl"] += np.sum(np.exp(p) * (p - q))
            sums["kl_reverse"] += np.sum(np.exp(q) * (q - p))
            sums["agreement"] += np.argmax(p) == np.argmax(q)
            if at + 1 < ids.shape[1] and segments[row, at + 1] == segments[row, at]:
                sums["predicted"] += 1
                sums["cross_entropy"] -= q[ids[row, at + 1]]
    return found


def figures_of(sums):
    summed = {name: sum(each[name] for each in sums) for name in sums[0]}
    ratios = {name: summed[top] / summed[bottom] for name, (top, bottom) in FIGURES.items()}
    return ratios | {"perplexity": np.exp(ratios["perplexity"]), "tokens": summed["tokens"]}


def measure(pair, batches, **axes):
    mesh = make_mesh(**axes, devices=jax.devices()[: int(np.prod([*axes.values()]))])
    with jax.set_mesh(mesh):
        placed = [
            Model(jax.device_put(m.params, param_shardings(model_variables(m.config), mesh)), m.config) for m in pair
        ]
        return compare_quality(dict(zip(("teacher", "student"), placed)), batches, mesh, np.float32)


@pytest.mark.parametrize("axes", [{"fsdp": 1}, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
def test_figures_equal_plain_numpy(pair, batches, axes):
    found, teacher = measure(pair, batches, **axes), pair[0]
    for name, model in zip(("teacher", "student"), pair):
        expected = by_hand(model, teacher, batches)
        own = found[name]
        whole = {key: own[key] for key in (*FIGURES, "tokens")}
        assert whole == pytest.approx(figures_of(list(expected.values())), rel=1e-4, abs=1e-6)
        assert [(bucket["first"], bucket["end"]) for bucket in own["positions"]] == [(0, 40), (40, 80)]
        for bucket in own["positions"]:
            inside = [sums for at, sums in expected.items() if bucket["first"] <= at < bucket["end"]]
            part = {key: bucket[key] for key in (*FIGURES, "tokens")}
            assert part == pytest.approx(figures_of(inside), rel=1e-4, abs=1e-6)
    student = found["student"]
    assert found["teacher"]["kl"] == 0.0
    assert found["teacher"]["agreement"] == 1.0
    assert student["kl"] > 1e-3
    assert abs(student["kl"] - student["kl_reverse"]) > 1e-3  # that of one is not that of the other
    for name in FIGURES:
        low, high = student["intervals"][name]
        assert low < student[name] < high


def test_text_without_a_token_to_predict_is_refused(pair):
    with pytest.raises(DataError, match="no token to predict"):
        measure(pair, [], fsdp=1)


def test_buckets_double_up_to_a_row():
    assert position_edges(4096) == [0, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert position_edges(131_072)[:3] == [0, 1024, 2048]
    assert position_edges(100) == [0, 50, 100]
    assert position_edges(40) == [0, 40]
