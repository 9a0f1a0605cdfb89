"""The flat file of token ids on disk, compared with its checksums block by block as it is read."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.checksums import checksum
from jaxhybrid.errors import DataError

BLOCK_BYTES = (
    1 << 17
)  # as much as Linux reads around a page of a mapped file: verifying reads hardly more from the disk


class TokenFile:
    """Token ids [n] in a mapped file. A slice of it is an array; other arrays are made of it with `np.asarray`.

    A block is verified when it is first read. When one is damaged, the file is made again.
    """

    def __init__(self, path: Path, dtype: np.dtype, checksums: np.ndarray | None, make_again: Callable[[], np.ndarray]):
        """
        Args:
            checksums: what `block_checksums` gave; None reads unverified.
            make_again: puts a new file at `path` and returns its checksums.
        """
        self.path, self._checksums, self._make_again = path, checksums, make_again
        self._ids = np.memmap(path, dtype, "r")
        self._verified = np.full(blocks_of(self._ids), checksums is None)
        self._lock = threading.Lock()

    @property
    def dtype(self) -> np.dtype:
        return self._ids.dtype

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        if start < stop:
            size = self.dtype.itemsize
            self._verify(start * size // BLOCK_BYTES, (stop * size - 1) // BLOCK_BYTES)
        return self._ids[where]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)

    def _verify(self, first: int, last: int) -> None:
        verified = self._verified  # of this file; another thread may be making a new one
        for block in range(first, last + 1):
            if not verified[block] and not self._is_whole(block):
                with self._lock:
                    if not self._is_whole(block):
                        self._replace(block)
            verified[block] = True

    def _is_whole(self, block: int) -> bool:
        assert self._checksums is not None
        return checksum(_block(self._ids, block)) == self._checksums[block]

    def _replace(self, block: int) -> None:
        self._open()
        if self._is_whole(block):  # another process has made the file again
            return
        warnings.warn(
            f"{self.path} is damaged: block {block} of {len(self._verified)} does not match its checksum. "
            "The text is tokenised again.",
            stacklevel=5,
        )
        assert self._checksums is not None
        if not np.array_equal(self._make_again(), self._checksums):
            raise DataError(f"{self.path} was damaged, and its text gives other tokens now. Start a new run.")
        self._open()

    def _open(self) -> None:
        self._ids = np.memmap(self.path, self.dtype, "r")
        self._verified = np.zeros(len(self._verified), bool)


def blocks_of(ids: np.ndarray) -> int:
    return -(-ids.nbytes // BLOCK_BYTES)


def block_checksums(path: Path, dtype: np.dtype) -> np.ndarray:
    """Of each block of the file, [blocks] uint64."""
    ids = np.memmap(path, dtype, "r")
    return np.array([checksum(_block(ids, block)) for block in range(blocks_of(ids))], np.uint64)


def _block(ids: np.ndarray, block: int) -> np.ndarray:
    size = BLOCK_BYTES // ids.dtype.itemsize
    return ids[block * size : (block + 1) * size]
