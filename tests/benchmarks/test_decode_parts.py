"""Which parts of a decoded token benchmarks/decode_parts.py times."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cases_of(monkeypatch, tmp_path):
    """(arguments) -> the parts whose forms would be compiled."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    decode_parts = importlib.import_module("decode_parts")

    def cases(*names):
        """Of a maker: a case of each of these parts."""
        return lambda shape: [decode_parts.Case(name, "a form", 1, None, [], [], 0) for name in names]

    products = cases("inputs, linear", "inputs, softmax", "output", "gate and up", "down")
    others = {"state": cases("state"), "attention": cases("attention, 1024", "attention, 65536"),
              "softmax token": cases("softmax token, 1024")}  # fmt: skip
    for name in decode_parts.PARTS:
        monkeypatch.setitem(decode_parts.PARTS, name, others.get(name, products))
    taken = []
    monkeypatch.setattr(decode_parts, "compiled", lambda case: taken.append(case.part) or "not here")

    def run(*arguments):
        taken.clear()
        output = ["--output", str(tmp_path / "rows.json")]
        monkeypatch.setattr(sys, "argv", ["decode_parts.py", *arguments, *output])
        decode_parts.main()
        return sorted(taken)

    return run


def test_parts_that_are_named_or_all(cases_of):
    assert cases_of("attention", "down") == ["attention, 1024", "attention, 65536", "down"]
    assert cases_of("softmax token") == ["softmax token, 1024"]
    assert len(cases_of()) == 9


def test_what_is_no_part_is_refused(cases_of, capsys):
    with pytest.raises(SystemExit):
        cases_of("atention")
    assert "invalid choice: 'atention'" in capsys.readouterr().err
