"""Checkpoints of a stage: the training state and the place in the data, written together in the background (orbax)."""

import errno
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxhybrid import hosts
from jaxhybrid.checksums import MANIFEST, verify, write_manifest
from jaxhybrid.errors import DamageError, RunError
from jaxhybrid.files import make_folder, remove, storage_errors
from jaxhybrid.train.earlier import LAYOUT, from_earlier_layout, in_earlier_layout

Position = dict[str, Any]  # JSON: where the batch iterator is, and whatever else going on from here needs

_UNFINISHED = re.compile(r"\d+(\.draft)?(\.orbax-checkpoint-tmp.*)?")


def steps_in(folder: Path) -> list[int]:
    """Of the whole checkpoints in a folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` kept. One has its step as its name only when it is whole."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = make_folder(folder), keep
        self._writes = hosts.is_first()  # names; every process writes its own arrays
        for path in self.folder.iterdir() if self._writes else ():  # what a killed process left
            if _UNFINISHED.fullmatch(path.name) and not path.name.isdecimal():
                remove(path)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def steps(self) -> list[int]:
        """Of the whole checkpoints, oldest first, as this process sees them."""
        return steps_in(self.folder)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, as the first process sees it."""
        return hosts.by_first(lambda: max(self.steps, default=None), "newest checkpoint")

    def save(self, step: int, state: Any, position: Position, *, wait: bool = False) -> None:
        """Starts writing; returns once the arrays are copied, or with `wait` once the checkpoint is on disk."""
        self.wait()
        draft = self.folder / f"{step}.draft"
        with orbax_errors(self.folder):
            saving = ocp.save_async(draft.absolute(), state, custom_metadata=_metadata(position=position))
        self._writing = self._thread.submit(self._commit, step, draft, saving)
        if wait:
            self.wait()

    def _commit(self, step: int, draft: Path, saving: Any) -> None:
        saving.result()  # every process's arrays are there
        if not self._writes:
            return
        write_manifest(draft)
        draft.rename(self.folder / str(step))
        for older in self.steps[: -self.keep]:
            remove(self.folder / str(older))

    def restore(self, like: Any) -> tuple[Any, Position]:
        """The newest state, placed as the arrays (or ShapeDtypeStructs with shardings) of `like` are.

        Checkpoints that are damaged are set aside, with a warning, once an older one was read.

        Raises:
            DamageError: there is no other one.
            RunError: there is none at all, or it does not fit `like`.
        """
        steps = hosts.by_first(lambda: self.steps, "checkpoints")
        if not steps:
            raise RunError(f"{self.folder} has no checkpoint.")
        faults: dict[int, DamageError] = {}
        way_out = f"Delete the folder {self.folder} to start over."
        for step in reversed(steps):
            try:
                state, position = self._read(step, like)
            except DamageError as error:
                faults[step] = error
                continue
            except RunError as error:
                raise RunError(f"{error}. {way_out}") from error
            for damaged, fault in faults.items():
                aside = hosts.by_first(partial(_set_aside, self.folder / str(damaged)), "set aside")
                warnings.warn(f"{fault}: set aside as {aside}; going on from step {step}.", stacklevel=2)
            return state, position
        found = "; ".join(map(str, faults.values()))
        raise DamageError(f"{found}. There is no other checkpoint. {way_out}")

    def _read(self, step: int, like: Any) -> tuple[Any, Position]:
        state, metadata = read_tree(self.folder / str(step), like)
        if "position" not in metadata:
            raise DamageError(f"{self.folder / str(step)} lacks its place in the data")
        return state, metadata["position"]

    def wait(self) -> None:
        """Until what is being written is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with orbax_errors(self.folder):
                writing.result()
            hosts.barrier("checkpoint written")

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()
        self.wait()


def write_tree(folder: Path, tree: Any) -> None:
    """Arrays and their checksums, in place of what `folder` holds."""
    with orbax_errors(folder):
        ocp.save(folder.absolute(), tree, overwrite=True, custom_metadata=_metadata())
    hosts.by_first(lambda: write_manifest(folder), "checksums")


def read_tree(folder: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays in `folder`, placed as those (or the ShapeDtypeStructs) of `like` are, and what was written with them.

    Raises:
        DamageError: a file is gone or damaged.
        RunError: the arrays are other ones than those of `like`.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    whole = hosts.by_first(lambda: verify(folder), "verify")
    with _same_for_all(), _unreadable(folder, whole):
        metadata = ocp.metadata(folder.absolute()).custom_metadata or {}
        if not whole and MANIFEST in metadata:
            raise DamageError(f"{folder / MANIFEST} is gone")
        if metadata.get("layout") == LAYOUT:
            tree = ocp.load(folder.absolute(), abstract)
        else:
            earlier = ocp.load(folder.absolute(), in_earlier_layout(abstract))
            tree = from_earlier_layout(earlier, abstract)
    if not whole:
        warnings.warn(f"{folder} has no checksums: an earlier version wrote it. It is read unverified.", stacklevel=2)
    return tree, metadata


def _metadata(**custom: Any) -> dict[str, Any]:
    """What orbax keeps beside the arrays; from the manifest's name in it follows that there was one."""
    return {**custom, MANIFEST: True, "layout": LAYOUT}


@contextmanager
def _same_for_all() -> Iterator[None]:
    """Damage that one process finds is raised by all of them, so that they take the same way out."""
    fault = None
    try:
        yield
    except DamageError as error:
        fault = error
    found = [text for text in hosts.gather(fault and str(fault), "damage") if text]
    if found:
        raise fault or DamageError(found[0])


def _set_aside(path: Path) -> str:
    names = (path.with_name(f"{path.name}.damaged{number}") for number in ("", *(f"-{n}" for n in range(2, 100))))
    return str(path.rename(next(name for name in names if not name.exists())))


@contextmanager
def orbax_errors(folder: Path) -> Iterator[None]:
    """`storage_errors` around orbax, which reports storage trouble under several types; the text tells which it was."""
    try:
        yield
    except Exception as error:
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            if f"[Errno {code}]" in text or f"os_error_code='{code}'" in text:
                with storage_errors(folder):
                    raise OSError(code, os.strerror(code)) from error
        raise


@contextmanager
def _unreadable(folder: Path, whole: bool) -> Iterator[None]:
    """Says of what orbax raises while it reads: the folder does not fit or, unless it is `whole`, may be damaged."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError, RunError):  # a device without room, say
        raise
    except Exception as error:  # tensorstore has no type of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if whole:
            raise RunError(f"{folder} does not fit this run ({reason})") from error
        raise DamageError(f"{folder} is damaged or does not fit this run ({reason})") from error
