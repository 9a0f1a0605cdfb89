import json
from dataclasses import replace

import numpy as np
import pytest

from jaxhybrid.data import TokenStream, open_source, open_tokens, training_batches
from jaxhybrid.data.packing import hash_seed
from jaxhybrid.errors import DataError, RunError


@pytest.fixture(scope="module")
def stream(vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for part in range(3):
        texts = [" ".join(f"w{(part * 20 + i + j) % 50}" for j in range(1 + i % 13)) for i in range(20)]
        (folder / f"{part}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return TokenStream(open_source(str(folder / "*.jsonl"), streaming=True), vocabulary, shuffle_buffer=7)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["segment_ids"], b["segment_ids"])


def one_pass(iterator, tokens):
    """Batches until `tokens` tokens are used, which must end exactly at a batch."""
    seen = []
    while sum((b["segment_ids"] > 0).sum() for b in seen) < tokens:
        seen.append(next(iterator))
    assert sum((b["segment_ids"] > 0).sum() for b in seen) == tokens
    return seen


def test_a_pass_has_every_token_once_and_the_next_another_order(stream, vocabulary, tmp_path):
    dataset = open_tokens(stream.source, vocabulary, tmp_path)
    iterator = training_batches(stream, 16, 1, seed=0)
    passes = [one_pass(iterator, dataset.num_tokens) for _ in range(2)]
    for seen in passes:
        used = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in seen])
        np.testing.assert_array_equal(np.sort(used), np.sort(dataset.tokens))
    assert sum(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(*passes)) < 3
    assert not np.array_equal(np.concatenate([b["tokens"].ravel() for b in passes[0]])[:100], dataset.tokens[:100])


@pytest.mark.parametrize("step", [0, 1, 4, 11, 50])
@pytest.mark.parametrize(
    ("longest", "shortest", "separate"), [(None, 1, True), (5, 1, True), (5, 3, True), (None, 6, False)]
)
def test_resumes_bit_for_bit_at_any_step(stream, step, longest, shortest, separate):
    stream = replace(stream, max_document_tokens=longest).at_least(shortest)
    iterator = training_batches(stream, 16, 2, seed=1, separate_documents=separate)
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 30)
    resumed = training_batches(stream, 16, 2, seed=1, separate_documents=separate)
    resumed.set_state(state)
    assert_same(take(resumed, 30), expected)
    assert resumed.get_state() == iterator.get_state()


def test_hosts_share_documents_without_loss_or_overlap(stream):
    parts = [[p.document for p in stream.pieces(seed=2, share=i, shares=3)] for i in range(3)]
    assert sorted(number for part in parts for number in part) == list(range(60))
    own = [next(training_batches(stream, 16, 6, seed=2, process_index=i, process_count=3)) for i in range(3)]
    assert [b["tokens"].shape for b in own] == [(2, 16)] * 3
    assert not np.array_equal(own[0]["tokens"], own[1]["tokens"])


def test_another_number_of_hosts_is_refused_on_resumption(stream):
    state = training_batches(stream, 16, 6, seed=2).get_state()
    with pytest.raises(RunError, match="process_count was 1 when the state was saved and is 3 now"):
        training_batches(stream, 16, 6, seed=2, process_count=3).set_state(state)


def test_segments_are_single_documents(stream):
    for batch in take(training_batches(stream, 16, 2, seed=0), 10):
        for row, segments in zip(batch["tokens"], batch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                assert (row[segments == segment][:-1] != 2).all()  # EOS only at the end of one


def test_less_text_than_one_batch_is_refused(stream):
    with pytest.raises(DataError, match=r"fills \d rows of 128 tokens for host 0 of 1; one batch needs 64"):
        next(training_batches(stream, 128, 64, seed=0))


def test_an_empty_stream_is_refused(vocabulary, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    empty = TokenStream(open_source(str(tmp_path / "a.jsonl"), streaming=True), vocabulary)
    with pytest.raises(DataError, match="fills 0 rows"):
        next(training_batches(empty, 16, 1, seed=0))


def test_an_error_of_the_source_reaches_the_reader(vocabulary, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n{"txt": "w2"}\n')
    broken = TokenStream(open_source(str(tmp_path / "a.jsonl"), streaming=True), vocabulary)
    with pytest.raises(DataError, match="no column 'text'"):
        next(training_batches(broken, 2, 1, seed=0))


def test_documents_that_are_not_separate_are_one_text_a_row(stream):
    apart, together = (
        training_batches(stream, 16, 2, seed=3, separate_documents=separate) for separate in (True, False)
    )
    for a, b in zip(take(apart, 20), take(together, 20)):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(b["segment_ids"], (a["segment_ids"] > 0).astype(int))
    with pytest.raises(RunError, match="separate_documents was False"):
        apart.set_state(together.get_state())


def test_short_documents_and_pieces_are_passed_over(stream):
    lengths = [len(piece.ids) for piece in stream.pieces()]
    long = [piece.ids.tolist() for piece in stream.at_least(9).pieces()]
    assert [len(ids) for ids in long] == [length for length in lengths if length >= 9]
    assert stream.at_least(9).at_least(4) == stream.at_least(9)
    split = replace(stream, max_document_tokens=5)
    expected = [piece for piece in split.pieces() if len(piece.ids) >= 5]
    for ours, theirs in zip(split.at_least(5).pieces(), expected, strict=True):
        assert ours[:3] == theirs[:3]
        np.testing.assert_array_equal(ours.ids, theirs.ids)
    assert stream.at_least(9).fingerprint != stream.fingerprint
    with pytest.raises(DataError, match="fills 0 rows"):
        next(training_batches(stream.at_least(1000), 16, 1, seed=0))


def test_a_stream_of_a_run_made_before_short_documents_could_be_left_out_is_resumed(stream):
    settings = (None, "split", 7, [])
    earlier = hash_seed(0, repr((stream.source.fingerprint, stream.vocabulary.fingerprint, settings)))
    assert stream.fingerprint == f"{earlier:016x}"
