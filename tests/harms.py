"""What disks do to files: a bit flips, the end is lost, the file is gone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

FLIPS = 40  # of the files of a folder together, one at least for each


@contextmanager
def harmed(path: Path, harm: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """In the block the file holds what `harm` makes of its content, or is gone; then it is whole again."""
    whole = path.read_bytes()
    harm_of = harm(whole)
    if harm_of is None:
        path.unlink()
    else:
        path.write_bytes(harm_of)
    try:
        yield
    finally:
        path.write_bytes(whole)


def flip(whole: bytes, rng: np.random.Generator) -> bytes:
    """One bit is another one, at a random place."""
    data = bytearray(whole)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)


def flipped(path: Path, rng: np.random.Generator) -> AbstractContextManager[None]:
    return harmed(path, lambda whole: flip(whole, rng))


def cut(path: Path) -> AbstractContextManager[None]:
    """The second half is lost."""
    return harmed(path, lambda whole: whole[: len(whole) // 2])


def gone(path: Path) -> AbstractContextManager[None]:
    return harmed(path, lambda whole: None)


def harms(folder: Path, seed: int) -> Iterator[tuple[Path, AbstractContextManager[None]]]:
    """Each file of `folder` that is not empty, and a harm to do to it; three kinds for each."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for path in files:
        yield path, gone(path)
        yield path, cut(path)
        for _ in range(-(-FLIPS // len(files))):
            yield path, flipped(path, rng)
