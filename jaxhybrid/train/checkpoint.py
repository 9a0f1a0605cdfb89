"""Checkpoints of a stage: the training state and the place in the data, written together in the background (orbax)."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxhybrid.errors import RunError
from jaxhybrid.files import make_folder, storage_errors

Position = dict[str, Any]  # JSON: where the batch iterator is, and whatever else going on from here needs


class Checkpoints:
    """The checkpoints in one folder, newest two kept. A checkpoint appears under its name only when it is whole."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = make_folder(folder)
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, position: Position, *, wait: bool = False) -> None:
        """Starts writing; returns once the arrays are copied, or with `wait` once the checkpoint is on disk."""
        if step == self.latest:
            return
        with orbax_errors(self.folder):
            self._checkpointer.save_async(step, state, custom_metadata={"position": position})
            if wait:
                self._checkpointer.wait()

    def restore(self, like: Any) -> tuple[Any, Position]:
        """The newest state, placed as the arrays (or ShapeDtypeStructs with shardings) of `like` are."""
        step = self.latest
        if step is None:
            raise RunError(f"{self.folder} has no checkpoint.")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        with damage(
            self.folder / str(step), "Delete it to go on from an older one, or the stage's folder to start over"
        ):
            state = self._checkpointer.load(step, abstract)
            metadata = self._checkpointer.metadata(step).custom_metadata
        if not isinstance(metadata, dict):
            raise RunError(
                f"{self.folder / str(step)} lacks its position in the data. Delete it to go on from an older one."
            )
        return state, metadata["position"]

    def close(self) -> None:
        """Waits for what is being written."""
        with orbax_errors(self.folder):
            self._checkpointer.close()


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
def damage(path: Path, way_out: str) -> Iterator[None]:
    """Says of what orbax raises while it reads that `path` is damaged or of another shape."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # a device without room, say
        raise
    except Exception as error:  # tensorstore has no type of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise RunError(f"{path} is damaged or does not fit this run ({reason}). {way_out}.") from error
