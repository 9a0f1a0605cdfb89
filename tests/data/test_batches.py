"""Batches: the same every time, resumed at any step, shared between hosts without loss, in order when held out."""

import json

import numpy as np
import pytest

from jaxhybrid.data import (
    HeldoutBatches,
    mean_segment_tokens,
    open_source,
    open_tokens,
    take_heldout,
    training_batches,
)
from jaxhybrid.errors import DataError, RunError


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["segment_ids"], b["segment_ids"])


def used_tokens(batch_list):
    return sorted(int(t) for b in batch_list for t in b["tokens"][b["segment_ids"] > 0])


def test_a_batch_is_int32_rows(dataset):
    batch = next(training_batches(dataset, 16, 4, seed=0))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((4, 16), "int32"),
        "segment_ids": ((4, 16), "int32"),
    }


def test_seed_alone_sets_the_order(dataset):
    first = take(training_batches(dataset, 16, 4, seed=3), 60)  # beyond one epoch
    assert_same(first, take(training_batches(dataset, 16, 4, seed=3), 60))
    other = take(training_batches(dataset, 16, 4, seed=4), 60)
    assert sum(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(first, other)) < 5


def test_every_epoch_has_every_token_once_in_a_new_order(dataset):
    rows = -(-dataset.num_tokens // 16)
    iterator = training_batches(dataset, 16, 1, seed=0)
    first, second = take(iterator, rows), take(iterator, rows)
    assert used_tokens(first) == used_tokens(second) == sorted(np.asarray(dataset.tokens).tolist())
    assert sum(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(first, second)) < 5


@pytest.mark.parametrize("step", [0, 1, 7, 33, 34, 100])
def test_resumes_bit_for_bit_at_any_step(dataset, step):
    iterator = training_batches(dataset, 16, 4, seed=1)
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 40)

    resumed = training_batches(dataset, 16, 4, seed=1)
    resumed.set_state(state)
    assert resumed.taken == step
    assert_same(take(resumed, 40), expected)
    assert resumed.taken == step + 40

    rewound = training_batches(dataset, 16, 4, seed=1)
    take(rewound, 5)
    rewound.set_state(state)
    assert_same(take(rewound, 40), expected)


def test_asking_for_the_state_changes_nothing(dataset):
    watched, plain = training_batches(dataset, 16, 4, seed=1), training_batches(dataset, 16, 4, seed=1)
    states = []
    for _ in range(10):
        states.append(watched.get_state()["taken"])
        assert_same([next(watched)], [next(plain)])
    assert states == list(range(10))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed was 1 when .* and is 2 now"),
        ({"sequence_length": 8}, "sequence_length was 16"),
        ({"batch_size": 2}, "batch_size was 4"),
    ],
)
def test_a_state_of_other_settings_is_refused(dataset, change, named):
    settings = {"sequence_length": 16, "batch_size": 4, "seed": 1}
    state = training_batches(dataset, **settings).get_state()
    with pytest.raises(RunError, match=named):
        training_batches(dataset, **(settings | change)).set_state(state)


def test_a_state_of_other_text_is_refused(dataset):
    state = training_batches(dataset, 16, 4, seed=1).get_state()
    fewer = dataset.select(np.arange(len(dataset) - 1), "fewer")
    with pytest.raises(RunError, match="data was"):
        training_batches(fewer, 16, 4, seed=1).set_state(state)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_batch_without_loss_or_overlap(dataset, hosts):
    whole = take(training_batches(dataset, 16, 8, seed=5), 40)
    shares = [
        take(training_batches(dataset, 16, 8, seed=5, process_index=i, process_count=hosts), 40) for i in range(hosts)
    ]
    joined = [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in zip(*shares)]
    assert_same(joined, whole)


def test_a_run_may_resume_on_another_number_of_hosts(dataset):
    one = training_batches(dataset, 16, 8, seed=5)
    take(one, 9)
    two = training_batches(dataset, 16, 8, seed=5, process_index=1, process_count=2)
    two.set_state(one.get_state())
    np.testing.assert_array_equal(next(two)["tokens"], next(one)["tokens"][4:])


def test_a_batch_that_hosts_cannot_share_is_refused(dataset):
    with pytest.raises(DataError, match="batch_size 6 does not divide over 4 hosts"):
        training_batches(dataset, 16, 6, seed=0, process_count=4)
    with pytest.raises(DataError, match="process_index 2 is not among 2"):
        training_batches(dataset, 16, 6, seed=0, process_index=2, process_count=2)


def test_less_text_than_one_batch_is_refused(dataset):
    with pytest.raises(DataError, match=rf"has {dataset.num_tokens:,} tokens; one batch of 64 rows of 128 needs 8,192"):
        training_batches(dataset, 128, 64, seed=0)


def test_heldout_batches_are_the_text_in_order(dataset):
    held = HeldoutBatches(dataset, 16, 4)
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in held])
    np.testing.assert_array_equal(tokens, dataset.tokens)
    assert all(b["tokens"].shape == (4, 16) for b in held)
    assert_same(list(held), list(held))  # as often as needed
    assert_same([held[-1]], [held[len(held) - 1]])
    assert_same(held[1:3], [held[1], held[2]])


@pytest.mark.parametrize("tokens", [1, 16, 63, 64, 65, 200])
def test_heldout_batches_use_exactly_the_tokens_asked_for(dataset, tokens):
    held = HeldoutBatches(dataset, 16, 4, tokens)
    used = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in held])
    np.testing.assert_array_equal(used, dataset.tokens[:tokens])
    assert len(held) == -(-tokens // 64)


def test_heldout_batches_are_shared_between_hosts(dataset):
    whole = HeldoutBatches(dataset, 16, 4, 200)
    halves = [HeldoutBatches(dataset, 16, 4, 200, i, 2) for i in range(2)]
    assert_same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves)], list(whole))


def test_heldout_batches_refuse_more_than_there_is(dataset):
    with pytest.raises(DataError, match=r"needs 1,000,000"):
        HeldoutBatches(dataset, 16, 4, 1_000_000)


def test_pydoc_end_to_end(vocabulary, tmp_path):
    dataset = open_tokens(open_source("pydoc"), vocabulary, tmp_path / "cache")
    train, heldout = take_heldout(dataset, 5_000)
    iterator = training_batches(train, 128, 8, seed=0)
    seen = take(iterator, 20)
    assert all((b["segment_ids"][:, 0] == 1).all() for b in seen)
    assert sum(b["tokens"].size for b in HeldoutBatches(heldout, 128, 8, 5_000)) == 5 * 8 * 128
    iterator.close()


def test_documents_that_are_not_separate_are_one_text_a_row(dataset):
    apart, together = (
        training_batches(dataset, 16, 4, seed=1, separate_documents=separate) for separate in (True, False)
    )
    segments = 0
    for a, b in zip(take(apart, 40), take(together, 40)):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(b["segment_ids"], (a["segment_ids"] > 0).astype(int))
        segments = max(segments, a["segment_ids"].max())
    assert segments > 2
    state = json.loads(json.dumps(together.get_state()))
    resumed = training_batches(dataset, 16, 4, seed=1, separate_documents=False)
    resumed.set_state(state)
    assert_same(take(resumed, 5), take(together, 5))
    with pytest.raises(RunError, match=r"separate_documents was False .* and is None now"):
        apart.set_state(state)
    held = HeldoutBatches(dataset, 16, 4, 200, separate_documents=False)
    assert {int(b["segment_ids"].max()) for b in held} == {1}
    np.testing.assert_array_equal(
        np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in held]), dataset.tokens[:200]
    )


def test_a_run_made_before_documents_could_be_joined_is_resumed(dataset):
    assert training_batches(dataset, 16, 4, seed=1).get_state()["drawn_from"].keys() == {
        "data", "sequence_length", "batch_size", "seed",
    }  # fmt: skip


def test_short_documents_are_passed_over(dataset):
    long = dataset.at_least(20)
    assert sorted(long.lengths) == sorted(length for length in dataset.lengths if length >= 20)
    assert 0 < len(long) < len(dataset)
    assert long.fingerprint != dataset.fingerprint
    assert used_tokens(take(training_batches(long, 16, 1, seed=0), -(-long.num_tokens // 16))) == sorted(
        token for i in range(len(long)) for token in long.document(i)
    )
    assert dataset.at_least(int(dataset.lengths.min())) is dataset
    with pytest.raises(
        DataError, match=r"No document of .* has the 42 tokens .* min_document_tokens .* longest has 41"
    ):
        dataset.at_least(42)


@pytest.mark.parametrize("separate", [True, False])
def test_the_mean_segment_is_counted(dataset, separate):
    held = HeldoutBatches(dataset, 16, 4, 200, separate_documents=separate)
    lengths = [
        int((row == segment).sum()) for b in held for row in b["segment_ids"] for segment in set(row.tolist()) - {0}
    ]
    assert mean_segment_tokens(held) == pytest.approx(np.mean(lengths))
    assert sum(lengths) == 200
    assert (max(lengths) == min(lengths[:-1]) == 16) != separate
