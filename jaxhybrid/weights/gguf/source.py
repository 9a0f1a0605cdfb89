"""Which files make up one GGUF model, and their bytes as one stream."""

import bisect
import glob
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxhybrid.errors import WeightsError

MAGIC = b"GGUF"
SPLIT_NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")  # what llama.cpp calls the files of a split model


def is_gguf(name: str) -> bool:
    """Whether a teacher's name means GGUF: a file that is one, a name that says so, or a pattern of parts."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.suffix == ".gguf" or begins_as_gguf(path)
    return path.suffix == ".gguf" or glob.has_magic(name)


def begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def find_files(name: str) -> list[Path]:
    """The files that a name means: one file, all of llama.cpp's split it belongs to, or what a pattern matches.

    Matches are in the order of their names, in which numbers count as numbers: part2 before part10.

    Raises:
        WeightsError: there are none, or a file of the split is missing.
    """
    path = Path(name).expanduser()
    if not path.is_file() and glob.has_magic(name):
        found = [Path(match) for match in glob.glob(str(path)) if Path(match).is_file()]
        if not found:
            raise WeightsError(f"{name} matches no file; correct the pattern.")
        return sorted(found, key=_natural)
    split = SPLIT_NAME.fullmatch(path.name)
    if split is None:
        files = [path]
    else:
        stem, count = split.groups()
        files = [path.with_name(f"{stem}-{number + 1:05d}-of-{count}.gguf") for number in range(int(count))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{missing[0]} is not there; fetch it, or correct the name.")
    return files


def _natural(path: Path) -> list[Any]:
    """Texts and numbers of a path in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", str(path))]


class Joined(io.RawIOBase):
    """Files read one after the other as if they were one."""

    def __init__(self, files: Sequence[Path]):
        self._files = [file.open("rb", buffering=0) for file in files]
        self._ends = list(itertools.accumulate(file.stat().st_size for file in files))
        self._position = 0

    @property
    def size(self) -> int:
        return self._ends[-1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        index = bisect.bisect_right(self._ends, self._position)
        if index == len(self._files):
            return 0
        file, end = self._files[index], self._ends[index]
        file.seek(self._position - (self._ends[index - 1] if index else 0))
        count = file.readinto(memoryview(buffer)[: end - self._position]) or 0
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
