"""Writing files so that a reader sees either the old one or the whole new one."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxhybrid.errors import RunError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into an error that names the path and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"No space left on the disk of {path}. Free some, or choose another run_dir; nothing is lost up to the "
                "last checkpoint: run the same command again to go on."
            ) from error
        if error.errno == errno.EFBIG:
            raise RunError(
                f"{path} would be larger than its disk or `ulimit -f` allows. Raise that, or choose another run_dir; "
                "nothing is lost up to the last checkpoint: run the same command again to go on."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise RunError(f"{path} cannot be written ({error.strerror}). Choose a writable run_dir.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise RunError(f"{path}: {error.strerror}; a file stands where a folder is needed.") from error
        raise


def make_folder(path: Path) -> Path:
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary name in the same folder, then renames."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(
            f"{path} is not valid JSON ({error}). Delete it and run the step that wrote it again."
        ) from error
