import json

import numpy as np
import pytest

from jaxhybrid.data import TokenStream, open_source, open_tokens, take_heldout
from jaxhybrid.data.split import without
from jaxhybrid.errors import DataError


def jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return open_source(str(path))


TEXTS = [f"w{i % 50} w{i * 7 % 50} w{i * i % 50}" for i in range(60)]


def test_held_out_and_train_share_no_document(dataset):
    train, held = take_heldout(dataset, 300)
    assert not set(train.hashes.tolist()) & set(held.hashes.tolist())
    assert len(train) + len(held) == len(dataset)
    assert 300 <= held.num_tokens < 300 + 42  # the documents here have at most 41 tokens
    assert train.num_tokens + held.num_tokens == dataset.num_tokens
    assert len({train.fingerprint, held.fingerprint, dataset.fingerprint}) == 3


def test_the_choice_depends_on_the_text_alone(vocabulary, tmp_path):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    a = open_tokens(jsonl(tmp_path / "a.jsonl", TEXTS), vocabulary, tmp_path / "cache")
    b = open_tokens(jsonl(tmp_path / "b.jsonl", [TEXTS[i] for i in order]), vocabulary, tmp_path / "cache")
    assert set(take_heldout(a, 40)[1].hashes.tolist()) == set(take_heldout(b, 40)[1].hashes.tolist())


def test_copies_and_pieces_stay_on_one_side(vocabulary, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS)
    dataset = open_tokens(source, vocabulary, tmp_path / "cache", max_document_tokens=2)
    train, held = take_heldout(dataset, 30)
    assert not set(train.hashes.tolist()) & set(held.hashes.tolist())
    assert held.num_tokens % 2 == 0  # every document is there twice


@pytest.mark.parametrize("tokens", [1_400, 100_000])
def test_more_than_half_is_refused(dataset, tokens):
    with pytest.raises(DataError, match=rf"Holding out {tokens:,} tokens would take more than half"):
        take_heldout(dataset, tokens)


def test_no_tokens_are_refused(dataset):
    with pytest.raises(DataError, match="must be at least 1"):
        take_heldout(dataset, 0)


def test_a_stream_holds_out_its_first_documents(vocabulary, tmp_path):
    stream = TokenStream(jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS), vocabulary)
    train, held = take_heldout(stream, 20)
    kept = {piece.text_hash for piece in train.pieces(seed=1)}
    assert 20 <= held.num_tokens < 24
    assert held.document(0).tolist() == vocabulary.encode(TEXTS[:1])[0].tolist()
    assert not kept & set(held.hashes.tolist())  # the copies are left out too
    assert kept | set(held.hashes.tolist()) == {piece.text_hash for piece in stream.pieces()}
    with pytest.raises(DataError, match="would take all"):
        take_heldout(stream, 1_000)


def test_without_leaves_out_named_documents(dataset):
    few = without(dataset, dataset.hashes[:3])
    assert len(few) == len(dataset) - np.isin(dataset.hashes, dataset.hashes[:3]).sum()
    with pytest.raises(DataError, match="also held out"):
        without(dataset, dataset.hashes)
