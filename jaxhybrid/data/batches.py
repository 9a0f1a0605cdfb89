"""Batches of packed rows for one host, endless and resumable for training, finite and in order for held-out text.

Training order: in every epoch the documents are shuffled, packed into rows, and the rows shuffled, so that the pieces
of a long document do not share a batch. Batch n is a function of (dataset, sequence_length, batch_size, seed, n) alone.
Hosts take consecutive blocks of its rows, so the global batch is the same on any number of hosts, and a run may resume
on another number.
"""

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from jaxhybrid.data.packing import PackedRows, shuffled_order
from jaxhybrid.data.streaming import StreamBatches, TokenStream
from jaxhybrid.data.tokens import TokenDataset
from jaxhybrid.errors import DataError, RunError

Batch = dict[str, np.ndarray]  # tokens [B,T] int32, segment_ids [B,T] int32

READ_THREADS = 2  # packing a batch is copying; more threads only contend for the interpreter
PREFETCH_BATCHES = 4


class ShuffledBatches:
    """Batch n of the endless shuffled training order, at random: what grain's pipeline reads from."""

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        separate_documents: bool,
    ) -> None:
        self.dataset, self.sequence_length, self.batch_size, self.seed = dataset, sequence_length, batch_size, seed
        self.separate_documents = separate_documents
        self.rows = _host_rows(batch_size, process_index, process_count)
        self._epochs: dict[int, tuple[PackedRows, np.ndarray]] = {}
        self._lock = threading.Lock()
        self.rows_per_epoch = -(-dataset.num_tokens // sequence_length)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        batch = _empty_batch(len(self.rows), self.sequence_length)
        for local, row in enumerate(self.rows):
            epoch, position = divmod(index * self.batch_size + row, self.rows_per_epoch)
            packed, order = self._epoch(epoch)
            packed.fill(int(order[position]), batch["tokens"][local], batch["segment_ids"][local])
        return batch

    def __repr__(self) -> str:
        return f"ShuffledBatches({self.dataset.name!r})"

    def _epoch(self, epoch: int) -> tuple[PackedRows, np.ndarray]:
        with self._lock:
            if epoch not in self._epochs:
                documents = shuffled_order(len(self.dataset), self.seed, f"documents {epoch}")
                packed = PackedRows(self.dataset, self.sequence_length, documents, self.separate_documents)
                # Reading ahead can straddle two epochs; older ones are not needed again.
                self._epochs = {e: plan for e, plan in self._epochs.items() if e >= epoch - 1}
                self._epochs[epoch] = packed, shuffled_order(len(packed), self.seed, f"rows {epoch}")
            return self._epochs[epoch]


class BatchIterator(Iterator[Batch]):
    """An endless iterator whose place is a small JSON-able dict.

    `get_state()` names the batch that comes next and what it was drawn from; `set_state` of an iterator made with other
    data or settings raises RunError naming what differs, so a run never resumes on other batches unnoticed.
    """

    def __init__(self, iterator: grain.DatasetIterator, drawn_from: Mapping[str, Any]) -> None:
        self._drawn_from = dict(drawn_from)
        # grain's reading threads must end, and their iterator be freed, before the interpreter takes modules down: the
        # finalizer also runs at exit, and the list lets it drop the last reference.
        self._open = [iterator]
        self._finalizer = weakref.finalize(self, _close, self._open)
        self.taken = 0  # batches given out since the very beginning, over all resumptions

    def __next__(self) -> Batch:
        batch = next(self._open[0])
        self.taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"taken": self.taken, "drawn_from": dict(self._drawn_from), "position": dict(self._open[0].get_state())}

    def set_state(self, state: Mapping[str, Any]) -> None:
        theirs = state["drawn_from"]
        for key in sorted({*theirs, *self._drawn_from}):
            if theirs.get(key) != self._drawn_from.get(key):
                raise RunError(
                    f"Cannot resume the data: {key} was {theirs.get(key)!r} when the state was saved and is "
                    f"{self._drawn_from.get(key)!r} now. Restore it, or start a new run."
                )
        self._open[0].set_state(dict(state["position"]))
        self.taken = state["taken"]

    def close(self) -> None:
        """Ends the reading threads; the iterator is of no use afterwards."""
        self._finalizer()


def _close(iterators: list[grain.DatasetIterator]) -> None:
    iterators.pop().close()


def training_batches(
    data: TokenDataset | TokenStream,
    sequence_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    separate_documents: bool = True,
) -> BatchIterator:
    """Endless training batches: this host's rows, `batch_size / process_count` of them, of every global batch.

    Reads ahead in threads. Raises DataError when one batch needs more tokens than there are, or does not divide over
    the hosts.
    """
    rows = _host_rows(batch_size, process_index, process_count)
    drawn_from: dict[str, Any] = {
        "data": data.fingerprint,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
    }
    if not separate_documents:  # named only then: a run made before there was the choice can be resumed
        drawn_from["separate_documents"] = False
    if isinstance(data, TokenStream):
        stream = StreamBatches(data, sequence_length, len(rows), seed, process_index, process_count, separate_documents)
        drawn_from["process_count"] = process_count  # documents are dealt out to hosts
        return BatchIterator(iter(ThreadPrefetchIterDataset(stream, prefetch_buffer_size=PREFETCH_BATCHES)), drawn_from)
    _require_tokens(data, sequence_length * batch_size, f"one batch of {batch_size} rows of {sequence_length}")
    source = ShuffledBatches(data, sequence_length, batch_size, seed, process_index, process_count, separate_documents)
    reading = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    return BatchIterator(iter(grain.MapDataset.source(source).to_iter_dataset(reading)), drawn_from)


class HeldoutBatches(Sequence[Batch]):
    """The first `tokens` tokens of `dataset` (all when None), each once, unshuffled; iterate it as often as needed.

    A finite list of batches, made when asked for. The last is filled up with padding rows. Raises DataError when the
    dataset has fewer tokens.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        batch_size: int,
        tokens: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        separate_documents: bool = True,
    ) -> None:
        self.tokens = dataset.num_tokens if tokens is None else tokens
        _require_tokens(dataset, self.tokens, f"held-out evaluation on {self.tokens:,}")
        self._packed = PackedRows(dataset, sequence_length, separate_documents=separate_documents)
        self._batch_size = batch_size
        self._rows = _host_rows(batch_size, process_index, process_count)
        self._num_rows = -(-self.tokens // sequence_length)

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        batch = _empty_batch(len(self._rows), self._packed.sequence_length)
        for local, row in enumerate(self._rows):
            row += (index % len(self)) * self._batch_size
            if row < self._num_rows:
                self._packed.fill(row, batch["tokens"][local], batch["segment_ids"][local], limit=self.tokens)
        return batch


def mean_segment_tokens(batches: Iterable[Batch]) -> float:
    """Mean length of the segments in some batches: how far back a token may look at most, on average twice of it."""
    tokens = segments = 0
    for batch in batches:
        tokens += int(np.count_nonzero(batch["segment_ids"]))
        segments += int(batch["segment_ids"].max(axis=1).sum())
    return tokens / max(segments, 1)


def _empty_batch(rows: int, sequence_length: int) -> Batch:
    shape = (rows, sequence_length)
    return {"tokens": np.zeros(shape, np.int32), "segment_ids": np.zeros(shape, np.int32)}


def _host_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """Which rows of every global batch are this host's."""
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index {process_index} is not among {process_count} processes.")
    if batch_size < 1 or batch_size % process_count:
        raise DataError(f"batch_size {batch_size} does not divide over {process_count} hosts; make it a multiple.")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _require_tokens(dataset: TokenDataset, tokens: int, purpose: str) -> None:
    if tokens < 1 or dataset.num_tokens < tokens:
        raise DataError(
            f"{dataset.name!r} has {dataset.num_tokens:,} tokens; {purpose} needs {tokens:,}. "
            "Use more text, or fewer tokens, a smaller batch_size or a shorter sequence_length."
        )
