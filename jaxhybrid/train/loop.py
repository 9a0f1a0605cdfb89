"""The loop every stage runs in: batches in, updates, records, checkpoints, and an exact way back after a stop."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxhybrid import hosts
from jaxhybrid.errors import DivergenceError
from jaxhybrid.files import make_folder, storage_errors
from jaxhybrid.settings.stages import StageConfig
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.interrupt import Interrupted, StopSignals
from jaxhybrid.train.metrics import Recorder, write_metrics

HostBatch = dict[str, np.ndarray]
Metrics = dict[str, Any]  # of one update: float64 numbers, or nested lists of them


class Batches(Protocol):
    """An endless, deterministic stream of batches that can say where it is and go back there."""

    def __next__(self) -> HostBatch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def train(
    state: Any,
    step: Callable[[Any, HostBatch], tuple[Any, dict[str, jax.Array]]],
    batches: Batches,
    folder: Path,
    stage: StageConfig,
    label: str,
    *,
    until: int | None = None,
    keep_last: bool = True,
    measure: Callable[[Any, int], dict[str, Any] | None] | None = None,
) -> Any:
    """Takes the stage's steps and returns the state, from the newest checkpoint in `folder` if there is one.

    Args:
        state: a pytree with a scalar `step`; overwritten (its buffers are donated by `step`).
        step: one update on a host batch; its metrics hold at least `loss` and `gradient_norm`.
        label: what the progress bar and a stop call the training.
        until: the step to end after; None: the stage's last.
        keep_last: whether a checkpoint is written after the last step, too.
        measure: called after an update with (state, updates done); what it returns is recorded (held-out losses, say).

    Raises:
        DivergenceError: a loss or gradient is not finite; names the step, the batch and the last checkpoint.
        Interrupted: SIGTERM or Ctrl-C, after a checkpoint was written.
    """
    until = stage.steps if until is None else until
    checkpoints = Checkpoints(folder / "checkpoints", stage.keep_checkpoints)
    unrecorded: list[Metrics] = []  # of the steps since the last record
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state)
        go_to(position["batches"], batches)
        unrecorded = position["unrecorded"]
        restore_records(folder, position)
    done = int(state.step)
    if done >= until:
        checkpoints.close()
        return state
    size = stage.tokens_per_step
    recorder = Recorder(folder, resume_step=done, total_tokens=until * size, done_tokens=done * size, label=label)
    pending: deque[_Pending] = deque()
    recorded, clock = done, time.perf_counter()
    with closing(checkpoints), closing(recorder), StopSignals() as stop, hosts.failures_reported():
        while done < until:
            batch = next(batches)
            state, metrics = step(state, batch)
            done += 1
            pending.append(_Pending(done, batch, metrics))
            measured = measure(state, done) if measure else None
            last = done == until
            signal = stop.asked()  # one that comes from here on is for the next step
            save = done % stage.checkpoint_every == 0 or signal is not None or (last and keep_last)
            record = bool(measured) or last or done % stage.log_every == 0
            if record or save:
                # Steps run ahead of the host; reading their metrics waits for them, so it is done in groups.
                unrecorded = [*unrecorded, *_read(pending, folder, checkpoints)]
            if record:
                values = {name: np.mean([one[name] for one in unrecorded], axis=0).tolist() for name in metrics}
                tokens = (done - recorded) * size
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                speed = tokens / elapsed
                recorder.write({"step": done, "tokens": done * size, **values, "tokens_per_second": speed})
                recorder.advance(tokens, loss=values["loss"])
                recorded, unrecorded = done, []
            if measured:
                recorder.write({"step": done, "tokens": done * size, **measured})
                clock = time.perf_counter()  # measuring is not training
            if save:
                # With all metrics, recorded or not yet: they depend neither on when a run is stopped nor on one file.
                position = {
                    "batches": place_of(batches),
                    "unrecorded": unrecorded,
                    "records": list(recorder.records),
                }
                checkpoints.save(done, state, position, wait=signal is not None)
            if signal is not None:
                raise Interrupted(
                    f"{label} stopped by signal {signal} after step {done} of {until}; "
                    f"checkpoint {checkpoints.folder / str(done)} is written. Run the same command again to go on.",
                    signal,
                )
    if stop.received is not None and not hosts.are_joined():  # while the last step was recorded or saved
        raise Interrupted(
            f"{label} stopped by signal {stop.received} after its last step. Run the same command again to go on.",
            stop.received,
        )
    return state


def restore_records(folder: Path, position: dict[str, Any]) -> None:
    """Writes the records that came with a checkpoint to their file; a checkpoint of an earlier version has none."""
    if "records" in position and hosts.is_first():
        write_metrics(folder, position["records"])


def place_of(batches: Batches) -> dict[str, Any]:
    """Where the stream is; where each process's is, when they differ as those of a streaming source do."""
    states = hosts.gather(batches.get_state(), "place in the data")
    return states[0] if states.count(states[0]) == len(states) else {"of_each_process": states}


def go_to(place: dict[str, Any], batches: Batches) -> None:
    """Sets the stream to what `place_of` gave. A stream of another number of processes refuses it."""
    states = place.get("of_each_process", [place])
    batches.set_state(states[jax.process_index() % len(states)])


@dataclass(frozen=True)
class _Pending:
    """An update whose metrics have not been read yet, with the batch to blame if they turn out not finite."""

    step: int
    batch: HostBatch
    metrics: dict[str, jax.Array]


def _read(pending: deque[_Pending], folder: Path, checkpoints: Checkpoints) -> list[Metrics]:
    """Metrics of each pending update, which are dropped. Stops at the first that is not finite."""
    read: list[Metrics] = []
    while pending:
        item = pending.popleft()
        values = {name: np.asarray(jax.device_get(value), np.float64) for name, value in item.metrics.items()}
        bad = [name for name in ("loss", "gradient_norm") if not np.isfinite(values[name])]
        if bad:
            name = f"bad-batch-{item.step}" + (f"-{jax.process_index()}" if hosts.count() > 1 else "")
            path = make_folder(folder) / f"{name}.npz"
            with storage_errors(path):
                np.savez(path, **item.batch)  # type: ignore[arg-type]  # numpy's stub takes array names for options
            checkpoints.wait()
            step = checkpoints.latest
            saved = "there is no checkpoint yet" if step is None else f"the last good checkpoint is step {step}"
            error = DivergenceError(
                f"{bad[0]} is {values[bad[0]]} at step {item.step}; its batch is saved as {path}; {saved}. "
                "Lower the learning rate or clip_norm, or look at the batch; then run the same command again."
            )
            error.shared = True  # metrics are the same everywhere
            raise error
        read.append({name: value.tolist() for name, value in values.items()})
    return read
