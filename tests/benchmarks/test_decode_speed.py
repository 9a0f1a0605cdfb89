"""What benchmarks/decode_speed.py says of its rows."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def decode_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("decode_speed")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({1024: 2.0, 4096: 2.0, 16384: 2.0}, "at every context from 1,024 tokens"),
        ({1024: 0.5, 4096: 0.5, 16384: 1.0}, "nowhere up to 16,384 tokens"),
        ({1024: 0.5, 4096: 2.0, 16384: 4.0}, "from about 2,000 tokens"),  # half way on a logarithmic axis: 2,048
        ({1024: 2.0, 4096: 0.25, 16384: 4.0}, "from about 8,200 tokens"),  # the last crossing counts
        ({512: 0.5, 4096: 2.0, 65536: 4.0}, "at every context from 4,096 tokens"),  # only what both have
        ({512: 0.5}, "is not known: no context was measured for both"),
    ],
)
def test_where_lines_cross(decode_speed, own, said):
    assert decode_speed.crossover(own, {1024: 1.0, 4096: 1.0, 16384: 1.0}) == said


def test_plots_say_from_where_a_hybrid_is_better(decode_speed, monkeypatch, tmp_path, capsys):
    rows = [
        {"part": "contexts", "shape": "llama-3.2-3b-instruct", "model": model, "context": context, "device": "a card",
         "tokens_per_second": speed, "prefill_tokens_per_second": 100 * speed, "state_gib": memory}
        for model, context, speed, memory in (
            ("teacher", 1024, 4.0, 1.0), ("teacher", 4096, 2.0, 4.0), ("0.25", 1024, 2.0, 2.0), ("0.25", 4096, 4.0, 2.0)
        )
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = [
        "plot",
        "--shape",
        "llama-3.2-3b-instruct",
        "--output",
        str(tmp_path / "rows.json"),
        "--images",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["decode_speed.py", *given])
    decode_speed.main()
    told = capsys.readouterr().out
    for said in (
        "Decoding: 25 % softmax, faster",
        "Reading a prompt: 25 % softmax, faster",
        "memories: 25 % softmax, less",
    ):
        assert f"{said} than the teacher from about 2,000 tokens" in told
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "decode-speed.png",
        "prefill-speed.png",
        "decode-memory.png",
    }


def test_a_shape_that_is_not_there_is_named(decode_speed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["decode_speed.py", "floor", "--shape", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        decode_speed.main()
    assert "none has no config.json" in capsys.readouterr().err
