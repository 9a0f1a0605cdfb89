"""The teacher's final hidden states for the batches that all candidates share, computed once and kept on disk."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxhybrid.errors import RunError
from jaxhybrid.files import make_folder, read_json, remove, storage_errors, write_json


class TeacherCache:
    """[batches, rows, T, D] in the compute dtype in a file, filled as batches are first asked for.

    Losing the process loses nothing: a batch counts as present only after its rows are on disk.
    """

    def __init__(self, path: Path, batches: int, rows: int, length: int, width: int, dtype: np.dtype):
        make_folder(path.parent)
        self.path, shape = path, (batches, rows, length, width)
        needed, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(path.parent).free
        mark = path.with_suffix(".json")
        description = {"shape": list(shape), "dtype": dtype.name}
        if not (path.exists() and mark.exists() and read_json(mark) == description):
            if needed > free:
                raise RunError(
                    f"The teacher's hidden states for scoring need {needed / 2**30:.1f} GiB at {path}, "
                    f"{free / 2**30:.1f} GiB are free. Choose another run_dir, lower score.tokens, or set "
                    "score.keep_teacher_states=false to run the teacher again for every layer."
                )
            with storage_errors(path):
                self.delete()
                _reserve(path, needed)
                _reserve(path.with_suffix(".present"), batches)
                write_json(mark, description)
        self._states = np.memmap(path, dtype, "r+", shape=shape)
        self._present = np.memmap(path.with_suffix(".present"), np.uint8, "r+", shape=(batches,))

    def get(self, index: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Hidden states of batch `index`, [rows,T,D]; `compute()` gives them the first time."""
        if not self._present[index]:
            self._states[index] = compute()
            with storage_errors(self.path):
                self._states.flush()
                self._present[index] = 1
                self._present.flush()
        return np.asarray(self._states[index])

    def delete(self) -> None:
        """Removes the files; an open map of them stays readable."""
        for suffix in (".json", ".present", self.path.suffix):  # the mark that says the others are whole goes first
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
