"""The teacher's final hidden states for the batches that all candidates share, computed once and kept on disk."""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.checksums import checksum, read_result, write_result
from jaxhybrid.errors import DamageError, RunError
from jaxhybrid.files import make_folder, remove, storage_errors

ABSENT, UNSUMMED = np.uint64(0), ~np.uint64(0)  # in place of a checksum
AGAIN = "The teacher's hidden states are computed again."


class TeacherCache:
    """[batches, rows, T, D] in the compute dtype in a file, filled as batches are first asked for.

    Losing the process loses nothing: a batch counts as present only after its rows are on disk, with their checksum.
    Rows that do not match it are computed again, with a warning.
    """

    def __init__(self, path: Path, batches: int, rows: int, length: int, width: int, dtype: np.dtype):
        make_folder(path.parent)
        self.path, shape = path, (batches, rows, length, width)
        sizes = {path: int(np.prod(shape)) * dtype.itemsize, path.with_suffix(".sums"): batches * 8}
        description = {"shape": list(shape), "dtype": dtype.name}
        if not self._is_there(description, sizes):
            with storage_errors(path):
                self.delete()
                try:
                    for file, size in sizes.items():
                        _reserve(file, size)
                except OSError:
                    self.delete()
                    raise
                write_result(path.with_suffix(".json"), description)
        self._states = np.memmap(path, dtype, "r+", shape=shape)
        self._sums = np.memmap(path.with_suffix(".sums"), np.uint64, "r+", shape=(batches,))  # ABSENT at first

    def _is_there(self, description: dict[str, Any], sizes: dict[Path, int]) -> bool:
        """Whether an earlier process left this cache; warns if it is damaged."""
        mark = self.path.with_suffix(".json")
        if not mark.exists():
            return False
        try:
            if read_result(mark) != description:
                return False
            self._upgrade()
            for file, size in sizes.items():
                found = file.stat().st_size if file.exists() else 0
                if found != size:
                    raise DamageError(f"{file} has {found:,} bytes and had {size:,}.")
        except RunError as error:
            warnings.warn(f"{error} {AGAIN}", stacklevel=4)
            return False
        return True

    def _upgrade(self) -> None:
        """An earlier version kept a byte for each batch that is present, and no checksums."""
        present, sums = self.path.with_suffix(".present"), self.path.with_suffix(".sums")
        if present.exists() and not sums.exists():
            warnings.warn(
                f"{self.path} has no checksums: an earlier version made it. It is read unverified.", stacklevel=5
            )
            np.where(np.fromfile(present, np.uint8) == 0, ABSENT, UNSUMMED).tofile(sums)
            present.unlink()

    def get(
        self, index: int, compute: Callable[[], np.ndarray], everywhere: Callable[[bool], bool] = bool
    ) -> np.ndarray:
        """Hidden states of batch `index`, [rows,T,D]; `compute()` gives them the first time.

        everywhere: told whether this process has them, says whether all do; `compute` needs all of them.
        """
        known, present = self._sums[index], checksum(self._states[index])
        if known not in (present, ABSENT, UNSUMMED):
            warnings.warn(f"Batch {index} of {self.path} does not match its checksum. {AGAIN}", stacklevel=4)
        if not everywhere(bool(known in (present, UNSUMMED))):
            self._states[index] = compute()
        elif known == present:
            return np.asarray(self._states[index])
        with storage_errors(self.path):
            self._states.flush()
            self._sums[index] = checksum(self._states[index])
            self._sums.flush()
        return np.asarray(self._states[index])

    def delete(self) -> None:
        """Removes the files; an open map of them stays readable."""
        # The mark that says the others are whole goes first.
        for suffix in (".json", ".present", ".sums", self.path.suffix):
            self.path.with_suffix(suffix).unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """A file of zeros whose blocks are taken: writing to a map of a sparse one kills the process on a full disk."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def cache_path(folder: Path, name: str, candidates: Sequence[int], process: int) -> Path:
    """Jobs that score other layers may share the folder, so each has files of its own."""
    return folder / f"teacher-{name}-{candidates[0]:03d}-{candidates[-1]:03d}-{process}.bin"


def remove_caches(folder: Path, candidates: Sequence[int]) -> None:
    """Removes every cache for some of these layers and others: nobody works on a layer twice, so its job was killed."""
    ours = candidates[0], candidates[-1]
    for path in folder.glob("teacher-*"):
        found = re.fullmatch(r"teacher-[a-z]+-(\d+)-(\d+)-\d+\.\w+", path.name)
        theirs = found and (int(found[1]), int(found[2]))
        if theirs and theirs != ours and theirs[0] <= ours[1] and ours[0] <= theirs[1]:
            remove(path)
