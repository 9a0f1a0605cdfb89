"""No token lost or repeated, segments in order, and no target across a boundary, for any documents and row length."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhybrid.data import TokenDataset
from jaxhybrid.data.packing import PackedRows, shuffled_order
from jaxhybrid.losses import next_token_targets


def make_dataset(lengths):
    """Documents of unique tokens 1, 2, ...; gaps between them in the flat array must not show."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths + 1) - lengths
    tokens = np.zeros(int((lengths + 1).sum()), np.uint32)
    for i, (start, length) in enumerate(zip(starts, lengths)):
        tokens[start : start + length] = 1 + lengths[:i].sum() + np.arange(length)
    return TokenDataset(tokens, starts, lengths, np.arange(len(lengths), dtype=np.uint64), "encoding", "made up")


def all_rows(packed):
    tokens = np.zeros((len(packed), packed.sequence_length), np.int32)
    segments = np.zeros_like(tokens)
    for row in range(len(packed)):
        packed.fill(row, tokens[row], segments[row])
    return tokens, segments


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(lengths_strategy, st.integers(1, 24), st.integers(0, 5))
def test_packing_invariants(lengths, sequence_length, seed):
    dataset = make_dataset(lengths)
    order = shuffled_order(len(lengths), seed, "test")
    tokens, segments = all_rows(PackedRows(dataset, sequence_length, order))

    flat = tokens.ravel()[segments.ravel() > 0]
    expected = np.concatenate([dataset.document(i) for i in order])
    np.testing.assert_array_equal(flat, expected)  # every token once, documents whole and in order

    padding = segments.ravel() == 0
    assert padding.sum() < sequence_length
    assert not padding[: len(expected)].any()  # at the very end alone
    assert (tokens.ravel()[padding] == 0).all()

    document_of = np.zeros(1 + sum(lengths), int)
    for i in range(len(lengths)):
        document_of[dataset.document(i)] = i
    for row, segment in zip(tokens, segments):
        used = segment > 0
        assert segment[0] == 1
        assert set(np.diff(segment[used])) <= {0, 1}  # 1, 2, 3, ... without holes
        changes = np.diff(document_of[row[used]]) != 0
        np.testing.assert_array_equal(changes, np.diff(segment[used]) != 0)  # a segment is one document, and back


@settings(max_examples=60, deadline=None)
@given(lengths_strategy, st.integers(1, 24))
def test_documents_that_are_not_separate_give_the_same_rows_as_one_segment(lengths, sequence_length):
    dataset = make_dataset(lengths)
    apart, together = (all_rows(PackedRows(dataset, sequence_length, None, separate)) for separate in (True, False))
    np.testing.assert_array_equal(together[0], apart[0])
    np.testing.assert_array_equal(together[1], (apart[1] > 0).astype(int))


@settings(max_examples=100, deadline=None)
@given(lengths_strategy, st.sampled_from([2, 5, 24]))
def test_targets_never_cross(lengths, sequence_length):
    tokens, segments = all_rows(PackedRows(make_dataset(lengths), sequence_length))
    more = ((0, 300 - len(tokens)), (0, 0))  # padding rows, so that a length is compiled once
    targets, mask = (np.asarray(x) for x in next_token_targets(np.pad(tokens, more), np.pad(segments, more)))
    assert not mask[len(tokens) :].any()
    ends = np.cumsum(lengths)  # the last token of each document, tokens being 1, 2, ...
    for row in range(len(tokens)):
        for t in range(sequence_length):
            token = tokens[row, t]
            has_next = t + 1 < sequence_length and token > 0 and token not in ends
            assert mask[row, t] == has_next
            if has_next:
                assert targets[row, t] == token + 1


def test_a_long_document_goes_on_in_the_next_row():
    tokens, segments = all_rows(PackedRows(make_dataset([2, 7]), 4))
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert segments.tolist() == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_a_limit_ends_the_text_early():
    packed = PackedRows(make_dataset([2, 7]), 4)
    tokens, segments = np.zeros(4, int), np.zeros(4, int)
    packed.fill(1, tokens, segments, limit=6)
    assert (tokens.tolist(), segments.tolist()) == ([5, 6, 0, 0], [1, 1, 0, 0])


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_shuffled_order_is_a_permutation_set_by_seed_and_salt(count):
    order = shuffled_order(count, 1, "a")
    assert sorted(order) == list(range(count))
    np.testing.assert_array_equal(order, shuffled_order(count, 1, "a"))
    if count == 1000:
        for other in (shuffled_order(count, 2, "a"), shuffled_order(count, 1, "b"), np.arange(count)):
            assert (order == other).sum() < 20


def test_shuffled_order_never_changes():
    """A run that is resumed with a newer version of anything must find the same order."""
    assert shuffled_order(12, 7, "documents 3").tolist() == SAVED_ORDER


SAVED_ORDER = [3, 7, 9, 5, 10, 2, 0, 11, 4, 8, 1, 6]
