"""Writing files so that a reader sees either the old one or the whole new one."""

import errno
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxhybrid.errors import JaxHybridError, RunError

GO_ON = (
    "choose another run_dir; nothing is lost up to the last checkpoint: run the same command again to go on"  # of a run
)
_number = itertools.count()  # of the drafts this process has made
_open: set[str] = set()  # those that it is at work on


@contextmanager
def storage_errors(path: Path, way_out: str = GO_ON) -> Iterator[None]:
    """Turns what a full or read-only disk raises into an error that names the path and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"No space left on the disk of {path}. Free some, or {way_out}.") from error
        if error.errno == errno.EFBIG:
            raise RunError(
                f"{path} would be larger than its disk or `ulimit -f` allows. Raise that, or {way_out}."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO):
            raise RunError(f"{path} cannot be written ({error.strerror}). Make it writable, or {way_out}.") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise RunError(
                f"{path}: {error.strerror}; a file stands where a folder is needed. Move it, or {way_out}."
            ) from error
        raise


def bucket_trouble(path: str | Path) -> str | None:
    """Why nothing is written to `path`, if it names object storage: as a Path it would be a folder called `gs:`."""
    if not any(re.fullmatch(r"[a-z][a-z0-9+.-]+:", part) for part in Path(path).parts):
        return None
    return (
        f"{path} names object storage, where nothing is written by itself. Mount the bucket (gcsfuse, Mountpoint for "
        "S3) or use a disk that all hosts share, and name the folder there"
    )


def make_folder(path: Path, way_out: str = GO_ON) -> Path:
    if trouble := bucket_trouble(path):
        raise RunError(f"{trouble}.")
    with storage_errors(path, way_out):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # parents are made too, so this is a place that takes no folders
            raise PermissionError(errno.EACCES, error.strerror) from error
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Where to write `path` before it gets its name: beside it, hidden, this process's own. Gone when the block ends.

    What processes of this machine that were killed have left of `path` is removed.
    """
    remove_stale(path)
    draft = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{next(_number)}.tmp")
    _open.add(draft.name)
    try:
        yield draft
    finally:
        remove(draft)
        remove_stale(path)  # now that another `path` stands
        _open.discard(draft.name)


def remove_stale(path: Path) -> None:
    """Removes drafts of `path` whose processes are gone. In containers each process may have the same number."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(platform.node())}-(\d+)-\d+\.(tmp|old)")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        found = pattern.fullmatch(entry.name)
        if not found or entry.with_suffix(".tmp").name in _open:
            continue
        ours = int(found[1]) == os.getpid()
        # An earlier `path` put aside is removed only once another one stands.
        if (ours or not is_running(int(found[1]))) and (found[2] == "tmp" or path.exists()):
            remove(entry)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_text(path: Path, text: str, way_out: str = GO_ON) -> None:
    """Writes to a temporary name in the same folder, then renames."""
    make_folder(path.parent, way_out)
    with storage_errors(path, way_out), draft_of(path) as draft:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


def write_json(path: Path, value: Any, way_out: str = GO_ON) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", way_out)


def read_json(
    path: Path,
    error: type[JaxHybridError] = RunError,
    way_out: str = "Delete it and run the step that wrote it again.",
) -> Any:
    """The content of a JSON file. Raises `error` with the way out when it is something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as damage:  # not JSON, or not even text
        raise error(f"{path} is not valid JSON ({damage}). {way_out}") from damage
