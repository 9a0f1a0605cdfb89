"""Documents laid end to end and ruled into rows of T tokens.

A row holds parts of one or more documents; `segment_ids` count them 1, 2, ... within the row. A document that meets the
end of a row goes on at the start of the next as a new segment, so no token is lost and none is repeated; a document
longer than T becomes consecutive pieces. Segment 0 is padding and is found only after the last document. Nothing may
look across a segment: attention, convolution and state reset there, and the token after the last of a segment is no
target. Where documents are not to be separate, the text of a row is one segment.
"""

import hashlib

import numpy as np

from jaxhybrid.data.tokens import TokenDataset


class PackedRows:
    """The rows of `dataset` with its documents in `order`; any row can be made at random in about T + documents-per-row
    time."""

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        order: np.ndarray | None = None,
        separate_documents: bool = True,
    ) -> None:
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.separate_documents = separate_documents
        self.order = np.arange(len(dataset)) if order is None else order
        self.ends = np.cumsum(dataset.lengths[self.order])  # [documents] where each document ends in the ordered text

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.sequence_length)

    def fill(self, row: int, tokens_T: np.ndarray, segment_ids_T: np.ndarray, limit: int | None = None) -> None:
        """Writes row `row` into two zeroed arrays. `limit`: tokens of the ordered text to use, from its start."""
        start = row * self.sequence_length
        stop = min(start + self.sequence_length, int(self.ends[-1]) if limit is None else limit)
        position = int(np.searchsorted(self.ends, start, side="right"))  # first document that reaches past `start`
        at, segment = start, 0
        while at < stop:
            document = self.order[position]
            end = int(self.ends[position])
            begin = int(self.dataset.starts[document]) + at - (end - int(self.dataset.lengths[document]))
            count = min(end, stop) - at
            segment = segment + 1 if self.separate_documents else 1
            here = slice(at - start, at - start + count)
            tokens_T[here] = self.dataset.tokens[begin : begin + count]
            segment_ids_T[here] = segment
            at += count
            position += 1


def shuffled_order(count: int, seed: int, salt: str) -> np.ndarray:
    """A permutation of range(count), [count] int64, set by seed and salt alone.

    Sorts by a 64-bit mix of the index (SplitMix64's finaliser): unlike a library's shuffle it can never change with a
    version, and a resumed run depends on it.
    """
    offset = np.uint64(hash_seed(seed, salt))
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + offset
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


def hash_seed(seed: int, salt: str) -> int:
    """64 bits drawn from a seed and a purpose, the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{salt}".encode(), digest_size=8).digest(), "little")
