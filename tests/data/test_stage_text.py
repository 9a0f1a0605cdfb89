"""The text each stage of a run reads: what `data` and the stage's own settings leave of it, and what is said of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from jaxhybrid.errors import DataError
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.settings.read import load_config

SHORT, LONG, END = 5, 30, 2  # words of a document, and the token that ends one


@pytest.fixture
def opened(tmp_path, tokenizer_folder):
    """A run over 80 short documents and 20 long ones, whose teacher is a tokenizer alone; nothing is trained."""
    texts = [
        " ".join(f"w{(i + j * (1 + i // 50)) % 50}" for j in range(LONG if i % 5 == 0 else SHORT)) for i in range(100)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stage = {"tokens": 1024, "sequence_length": 16, "batch_size": 4, "warmup_steps": 0}
    settings = {
        "name": "text",
        "run_dir": str(tmp_path / "run"),
        "teacher": "none",
        "data": {"train": str(tmp_path / "text.jsonl"), "heldout_tokens": 200, "cache_dir": str(tmp_path / "tokens")},
        **dict.fromkeys(("align", "score", "distill", "finetune"), stage),
        "score": {**stage, "heldout_tokens": 200},
        "select": {"measure": {"tokens": 200}},
        "evaluate": {"heldout_tokens": 200},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def run(*overrides):
        pipeline = Pipeline(load_config(tmp_path / "config.yaml", overrides))
        teacher = SimpleNamespace(folder=str(tokenizer_folder), config=SimpleNamespace(vocab_size=60))
        vars(pipeline.models)["teacher_files"] = teacher
        return pipeline

    return run


def documents(batch_list):
    """Lengths of the documents in batches of 16-token rows, from what is whole in a row."""
    rows = np.concatenate([b["tokens"] for b in batch_list])
    return {int(n) for row in rows for n in np.diff(np.flatnonzero(row == END))}


def first(pipeline, name, count=8):
    stream = pipeline.stream(name)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_stage_reads_only_documents_as_long_as_it_asks_for(opened, streaming):
    run = opened(f"data.streaming={streaming}", "finetune.min_document_tokens=20", "data.shuffle_buffer=5")
    assert documents(first(run, "distill")) == {SHORT + 1}
    assert documents(first(run, "finetune")) == set()  # 31 tokens never begin and end in a row of 16
    assert documents(run.text.heldout_batches(16, 4, 200)) == {SHORT + 1}


def test_no_stage_reads_documents_shorter_than_data_asks_for(opened):
    run = opened("data.min_document_tokens=20", "finetune.min_document_tokens=10")
    for name in ("align", "finetune"):
        assert documents(first(run, name)) == set()
    assert documents(run.text.heldout_batches(16, 4, 200)) == set()
    with pytest.raises(DataError, match=r"No document of .* has the 40 tokens"):
        first(opened("align.min_document_tokens=40"), "align")


def test_documents_run_together_where_they_are_not_separate(opened):
    run = opened("data.separate_documents=false")
    assert {int(b["segment_ids"].max()) for b in [*first(run, "distill"), *run.text.heldout_batches(16, 4, 200)]} == {1}


def test_the_mean_segment_is_said(opened, capsys):
    run = opened()
    mean = run.segment_tokens("distill")
    rows = np.concatenate([b["segment_ids"] for b in first(run, "distill", 16)])  # all of its 1024 tokens
    assert mean == pytest.approx(np.count_nonzero(rows) / rows.max(1).sum(), abs=0.05)
    assert f"\ndistill: rows of 16 tokens, a segment has {mean} on average\n" in capsys.readouterr().out
    run = opened("data.separate_documents=false")
    assert run.segment_tokens("distill") > 15.5  # a row is a segment, but for the padding at the end
