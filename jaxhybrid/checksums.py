"""Checksums (XXH3, 64 bits) over what a later stage reads, so that a flipped bit or a lost or short file is found then.

One core sums over 20 GB a second, more than disks give. They guard against damage, not against forgery. What has none,
because an earlier version wrote it, is read as it is.
"""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxhybrid.errors import DamageError, RunError
from jaxhybrid.files import read_json, write_json

MANIFEST = "checksums.json"  # of a folder: the checksum of every other file in it
KEY = "checksum"  # of a JSON object: the checksum of its other keys
READ_THREADS = 4
READ_BYTES = 1 << 22
AGAIN = "Delete it and run the step that wrote it again."


def checksum(data: Any) -> int:
    """Of bytes, or of the bytes of an array."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return xxhash.xxh3_64_intdigest(data)


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its keys and values as a last key."""
    return {**value, KEY: _text_checksum(value)}


def unseal(value: Any, where: str, way_out: str = AGAIN) -> Any:
    """What was sealed. Raises DamageError when it has changed since; `where` it lies begins the message."""
    if not isinstance(value, dict) or KEY not in value:
        return value
    found = {key: item for key, item in value.items() if key != KEY}
    if value[KEY] != _text_checksum(found):
        raise DamageError(f"{where} does not match its checksum: it is damaged, or was edited by hand. {way_out}")
    return found


def write_result(path: Path, value: dict[str, Any]) -> None:
    """A JSON file for `read_result`."""
    write_json(path, seal(value))


def read_result(path: Path, way_out: str = AGAIN) -> Any:
    """What `write_result` wrote. Raises RunError with the way out when it is damaged."""
    return unseal(read_json(path, way_out=way_out), str(path), way_out)


def write_manifest(folder: Path) -> None:
    """Sums every file in `folder`."""
    write_result(folder / MANIFEST, {name: file_checksum(folder / name) for name in _names(folder)})


def verify(folder: Path) -> bool:
    """Compares every file with the folder's manifest; False when it has none.

    Raises:
        DamageError: a file is gone or another one than was summed; names it.
    """
    if not (folder / MANIFEST).exists():
        return False
    try:
        expected = read_result(folder / MANIFEST)
    except RunError as error:
        raise DamageError(f"{folder / MANIFEST} is damaged") from error
    missing = sorted(expected.keys() - set(_names(folder)))
    if missing:
        raise DamageError(f"{folder / missing[0]} is gone")
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for name, found in zip(expected, pool.map(lambda name: file_checksum(folder / name), expected)):
            if found != expected[name]:
                raise DamageError(f"{folder / name} does not match its checksum")
    return True


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files if path.name != MANIFEST)


def file_checksum(path: Path) -> str:
    digest, buffer = xxhash.xxh3_64(), bytearray(READ_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                digest.update(memoryview(buffer)[:read])
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamageError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _text_checksum(value: dict[str, Any]) -> str:
    return f"{checksum(json.dumps(value).encode()):016x}"
