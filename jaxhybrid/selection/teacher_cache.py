"""The teacher's final hidden states for the batches that all candidates share, computed once and kept on disk."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxhybrid.errors import RunError
from jaxhybrid.files import make_folder, read_json, storage_errors, write_json


class TeacherCache:
    """[batches, rows, T, D] bfloat16 in a file, filled as batches are first asked for.

    Losing the process loses nothing: a batch counts as present only after its rows are on disk.
    """

    def __init__(self, path: Path, batches: int, rows: int, length: int, width: int):
        make_folder(path.parent)
        self.path, shape = path, (batches, rows, length, width)
        needed, free = int(np.prod(shape)) * 2, shutil.disk_usage(path.parent).free
        mark = path.with_suffix(".json")
        description = {"shape": list(shape), "dtype": "bfloat16"}
        if not (path.exists() and mark.exists() and read_json(mark) == description):
            if needed > free:
                raise RunError(
                    f"The teacher's hidden states for scoring need {needed / 2**30:.1f} GiB at {path}, "
                    f"{free / 2**30:.1f} GiB are free. Lower score.tokens or choose another run_dir."
                )
            with storage_errors(path):
                self.delete()
                _reserve(path, needed)
                _reserve(path.with_suffix(".present"), batches)
                write_json(mark, description)
        self._states = np.memmap(path, np.uint16, "r+", shape=shape)
        self._present = np.memmap(path.with_suffix(".present"), np.uint8, "r+", shape=(batches,))

    def get(self, index: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Hidden states of batch `index`, bfloat16 [rows,T,D]; `compute()` gives them the first time."""
        if not self._present[index]:
            self._states[index] = compute().astype(ml_dtypes.bfloat16).view(np.uint16)
            with storage_errors(self.path):
                self._states.flush()
                self._present[index] = 1
                self._present.flush()
        return np.asarray(self._states[index]).view(ml_dtypes.bfloat16)

    def delete(self) -> None:
        for suffix in (".json", ".present", self.path.suffix):  # the mark that says the others are whole goes first
            self.path.with_suffix(suffix).unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """A file of zeros whose blocks are taken: writing to a map of a sparse one kills the process on a full disk."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
