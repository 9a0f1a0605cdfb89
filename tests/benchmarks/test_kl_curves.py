"""How benchmarks/kl_curves.py compares the losses of forms, and the order it gives the rows of a batch."""

import argparse
import importlib
import os
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def kl_curves(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kl_curves")


def test_table_has_means_of_ten_steps_and_distances_from_the_first_form(kl_curves):
    before = np.arange(200.0, 0.0, -1.0)
    other = before.copy()
    other[[0, 99]] += [-3.0, 4.0]
    head, _, *rows = kl_curves.table({"before": before, "mlp": other}).splitlines()
    assert head.startswith("| form | KL, nats a token, at step 1 | 50 | 100 | 150 | 200 | largest difference")
    assert rows == [
        "| before | 200.00000 | 155.50000 | 105.50000 | 55.50000 | 5.50000 | 0 | 0 |",
        "| mlp | 197.00000 | 155.50000 | 105.90000 | 55.50000 | 5.50000 | 4 | 0.35 |",
    ]


def test_table_of_few_steps(kl_curves):
    head, _, row = kl_curves.table({"before": np.array([3.0, 2.0, 1.0])}).splitlines()
    assert "at step 1 | 2 | 3 | largest" in head
    assert row == "| before | 3.00000 | 2.50000 | 2.00000 | 0 | 0 |"


def test_other_order_is_of_the_same_rows_and_always_the_same(kl_curves):
    class Numbers:
        def training(self, stage, seed):
            for first in (0, 16):
                rows = np.arange(first, first + 16)
                yield {"tokens": rows, "segment_ids": -rows}

    text = kl_curves.OtherOrder(Numbers())
    for batch, again, rows in zip(text.training(None, 0), text.training(None, 0), Numbers().training(None, 0)):
        assert batch["tokens"].tolist() == again["tokens"].tolist() != rows["tokens"].tolist()
        assert sorted(batch["tokens"]) == rows["tokens"].tolist()
        assert (batch["segment_ids"] == -batch["tokens"]).all()


@pytest.mark.parametrize("found", [None, "0"])
def test_kernels_are_as_they_were_afterwards(kl_curves, monkeypatch, found):
    monkeypatch.setattr(kl_curves.jax, "clear_caches", lambda: None)
    monkeypatch.delenv(kl_curves.SWITCH, raising=False)
    if found is not None:
        monkeypatch.setenv(kl_curves.SWITCH, found)
    with kl_curves.attention_kernels(True):
        assert kl_curves.os.environ[kl_curves.SWITCH] == "1"
    assert kl_curves.os.environ.get(kl_curves.SWITCH) == found


def test_forms_reach_the_stage_and_the_kernels(kl_curves, monkeypatch):
    monkeypatch.setenv(kl_curves.SWITCH, "1")
    asked = {}

    class Students:
        text = "rows"

        def trained(self, stage, student, steps, seed, **changes):
            asked[student] = (os.environ[kl_curves.SWITCH], self.text == "rows", *changes.values())
            return None, np.zeros(steps)

    for name, form in kl_curves.FORMS.items():
        kl_curves.losses_of(form, Students(), name, argparse.Namespace(steps=3, seed=0))
    assert asked == {  # kernels, the rows' own order, remat, unroll, float8_teacher
        "before": ("0", True, "block", False, False),
        "other order": ("0", False, "block", False, False),
        "kernels": ("1", True, "block", False, False),
        "mlp": ("1", True, "mlp", False, False),
        "unrolled": ("1", True, "mlp", True, False),
        "float8": ("1", True, "mlp", True, True),
    }
    assert os.environ[kl_curves.SWITCH] == "1"
