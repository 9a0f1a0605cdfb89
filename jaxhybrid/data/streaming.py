"""Text read in passing, for sources too large to tokenise beforehand.

Documents are shuffled within a buffer (and the files of a local source as a whole) anew in every pass. The state counts
documents from the start of the pass, so resuming reads up to there again, without tokenising: exact, but not instant.
Each host takes every `process_count`-th document, so the batches depend on the number of hosts. Prefer `open_tokens`
where the disk allows.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import grain
import numpy as np

from jaxhybrid.data.packing import hash_seed, shuffled_order
from jaxhybrid.data.sources import Source
from jaxhybrid.data.tokens import LongDocuments, grouped, hash_text, pieces
from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import DataError

GROUP_CHARACTERS = 500_000  # text tokenised at a time; small, for a resumed or short run waits for the first group


class Piece(NamedTuple):
    """A document, or the part of a long one, on its way into rows."""

    document: int  # counted from the start of the pass, over all hosts
    offset: int  # tokens of the document before this piece
    text_hash: int
    ids: np.ndarray  # [n]


@dataclass(frozen=True)
class TokenStream:
    """A source tokenised as it is read."""

    source: Source
    vocabulary: Vocabulary
    max_document_tokens: int | None = None
    long_documents: LongDocuments = "split"
    shuffle_buffer: int = 10_000  # documents
    min_document_tokens: int = 1  # documents, and pieces of one, that are shorter are passed over
    excluded: frozenset[int] = field(default=frozenset(), repr=False)  # hashes of texts to pass over (held out)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def fingerprint(self) -> str:
        settings = [self.max_document_tokens, self.long_documents, self.shuffle_buffer, sorted(self.excluded)]
        if self.min_document_tokens > 1:  # else as before there was a choice, for runs that are resumed
            settings.append(self.min_document_tokens)
        return f"{hash_seed(0, repr((self.source.fingerprint, self.vocabulary.fingerprint, tuple(settings)))):016x}"

    def at_least(self, tokens: int) -> "TokenStream":
        """The documents of `tokens` tokens or more; the others are still tokenised, to know how long they are."""
        return replace(self, min_document_tokens=max(tokens, self.min_document_tokens))

    def pieces(
        self, seed: int | None = None, epoch: int = 0, skip: int = 0, share: int = 0, shares: int = 1
    ) -> Iterator[Piece]:
        """One pass over the documents from number `skip` on that fall to `share`; unshuffled when `seed` is None."""
        if seed is None:
            texts = self.source.documents()
        else:
            order = shuffled_order(len(self.source.parts), seed, f"files {epoch}")
            texts = _shuffle(self.source.documents([int(i) for i in order]), self.shuffle_buffer, seed, epoch)
        numbers: list[tuple[int, int]] = []  # (document, hash) of the texts in the group being gathered

        def wanted() -> Iterator[str]:
            for number, text in enumerate(texts):
                if number < skip or number % shares != share:
                    continue
                text_hash = hash_text(text)
                if text_hash not in self.excluded:
                    numbers.append((number, text_hash))
                    yield text

        for group in grouped(wanted(), GROUP_CHARACTERS):
            taken = numbers.copy()
            numbers.clear()
            for (number, text_hash), ids in zip(taken, self.vocabulary.encode(group)):
                offset = 0
                for piece in pieces(ids, self.max_document_tokens, self.long_documents):
                    if len(piece) >= self.min_document_tokens:
                        yield Piece(number, offset, text_hash, piece)
                    offset += len(piece)


def _shuffle(texts: Iterator[str], size: int, seed: int, epoch: int) -> Iterator[str]:
    """Gives back a random one of `size` waiting documents each time; size 1 keeps the order."""
    rng = random.Random(hash_seed(seed, f"buffer {epoch}"))
    waiting: list[str] = []
    for text in texts:
        if len(waiting) < size:
            waiting.append(text)
            continue
        index = int(rng.random() * size)
        waiting[index], text = text, waiting[index]
        yield text
    # Sorting by drawn keys, not random.shuffle: only random() is promised to stay the same between Python versions.
    keys = [rng.random() for _ in waiting]
    for index in sorted(range(len(waiting)), key=keys.__getitem__):
        yield waiting[index]


class StreamBatches(grain.IterDataset):
    """Endless batches {tokens, segment_ids} [B, T] of one host's share of a stream."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        rows: int,
        seed: int,
        share: int,
        shares: int,
        separate_documents: bool,
    ) -> None:
        super().__init__()
        self.stream, self.sequence_length, self.rows = stream, sequence_length, rows
        self.separate_documents = separate_documents
        self.seed, self.share, self.shares = seed, share, shares

    def __iter__(self) -> "StreamIterator":
        return StreamIterator(self)


class StreamIterator(grain.DatasetIterator):
    """State: the pass, and the document and token within it that come next."""

    def __init__(self, batches: StreamBatches) -> None:
        super().__init__()
        self._batches = batches
        self.set_state({"epoch": 0, "document": 0, "offset": 0})

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "document": self._document, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._document, self._offset = state["epoch"], state["document"], state["offset"]
        self._pieces = self._open()
        self._rest: Piece | None = None
        self._whole_pass = self._document == 0 and self._offset == 0  # begun at its start by this iterator
        self._rows_of_pass = 0

    def _open(self) -> Iterator[Piece]:
        b = self._batches
        for piece in b.stream.pieces(b.seed, self._epoch, self._document, b.share, b.shares):
            done = self._offset - piece.offset if piece.document == self._document else 0
            if done < len(piece.ids):
                done = max(done, 0)
                yield piece._replace(offset=piece.offset + done, ids=piece.ids[done:])

    def __next__(self) -> dict[str, np.ndarray]:
        shape = (self._batches.rows, self._batches.sequence_length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row in range(shape[0]):
            while not self._fill(tokens[row], segments[row]):
                self._next_pass()
        return {"tokens": tokens, "segment_ids": segments}

    def _fill(self, tokens_T: np.ndarray, segments_T: np.ndarray) -> bool:
        """Fills one row as far as the pass goes; False when the pass has nothing left."""
        at, segment = 0, 0
        while at < len(tokens_T):
            piece = self._rest or next(self._pieces, None)
            if piece is None:
                break
            used = piece.ids[: len(tokens_T) - at]
            segment = segment + 1 if self._batches.separate_documents else 1
            tokens_T[at : at + len(used)] = used
            segments_T[at : at + len(used)] = segment
            at += len(used)
            self._document, self._offset = piece.document, piece.offset + len(used)
            left = piece.ids[len(used) :]
            self._rest = piece._replace(offset=self._offset, ids=left) if len(left) else None
        self._rows_of_pass += at > 0
        return at > 0

    def _next_pass(self) -> None:
        b = self._batches
        needed = b.rows if self._epoch == 0 else 1  # later passes only have to be there at all
        if self._whole_pass and self._rows_of_pass < needed:
            raise DataError(
                f"Source {b.stream.name!r} fills {self._rows_of_pass} rows of {b.sequence_length} tokens "
                f"for host {b.share} of {b.shares}; one batch needs {b.rows}. "
                "Use more text, or a smaller batch_size or sequence_length."
            )
        self.set_state({"epoch": self._epoch + 1, "document": 0, "offset": 0})
