"""What a stage measures, in three places at once: a JSONL file, TensorBoard, and the progress bar."""

import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from jaxhybrid import hosts
from jaxhybrid.checksums import seal, unseal
from jaxhybrid.errors import DamageError
from jaxhybrid.files import make_folder, storage_errors, write_text

Record = dict[str, Any]  # {"step": 12, "tokens": 4096, "loss": ...}: plain numbers and short lists of them


def read_metrics(folder: Path, count: int | None = None) -> list[Record]:
    """The records of `folder/metrics.jsonl`, oldest first; none if there is no file.

    Args:
        count: how many a finished stage has written; None where that is not known.

    Raises:
        DamageError: a line is not what was written, or some are lost; names it.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    way_out = f"Delete the folder {folder} to train that stage again, or the file to go on without its records."
    lines = path.read_bytes().splitlines(keepends=True)
    # A killed process may leave half a last line; it belongs to a step that will be run again.
    whole = [line for line in lines if line.endswith(b"\n")]
    records = [_parsed(line, f"{path}, line {number}", way_out) for number, line in enumerate(whole, 1)]
    if count is not None and len(records) != count:
        raise DamageError(f"{path} has {len(records)} records and had {count}. {way_out}")
    return records


def write_metrics(folder: Path, records: list[Record]) -> None:
    """`folder/metrics.jsonl`, in place of what there is."""
    write_text(folder / "metrics.jsonl", "".join(map(_line, records)))


def _line(record: Record) -> str:
    return json.dumps(seal(record), allow_nan=False) + "\n"


def _parsed(line: bytes, where: str, way_out: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not even text
        raise DamageError(f"{where} is damaged ({error}). {way_out}") from error
    return unseal(record, where, way_out)


def training_figures(records: list[Record]) -> Record:
    """Steps, tokens, speed (the median) and losses of what was recorded; empty if nothing was."""
    measured = [record for record in records if "loss" in record]
    if not measured:
        return {}
    speeds = sorted(record["tokens_per_second"] for record in measured[1:] or measured)  # the first compiles
    return {
        "steps": measured[-1]["step"],
        "tokens": measured[-1]["tokens"],
        "loss_first": measured[0]["loss"],
        "loss_last": measured[-1]["loss"],
        "tokens_per_second": round(speeds[len(speeds) // 2]),
    }


class Recorder:
    """Records of one stage. Opening it again at a step forgets what was recorded after that step.

    On many hosts the first process records; those of the others do nothing.
    """

    def __init__(self, folder: Path, *, resume_step: int, total_tokens: int, done_tokens: int, label: str):
        self._writes = hosts.is_first()
        self.records: list[Record] = []  # on the first process, from the stage's first step on
        self.bar = tqdm(
            total=total_tokens,
            initial=done_tokens,
            desc=label,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self._writes,
        )
        if not self._writes:
            return
        make_folder(folder)
        if resume_step:
            self.records = [record for record in read_metrics(folder) if record["step"] <= resume_step]
        write_metrics(folder, self.records)
        self._path = folder / "metrics.jsonl"
        with storage_errors(folder):
            self._file: TextIO = self._path.open("a")
            self._board = _Board(make_folder(folder / "tensorboard"), resume_step + 1)

    def write(self, record: Record) -> None:
        if not self._writes:
            return
        with storage_errors(self._path):
            self._file.write(_line(record))
            self._file.flush()
            numbers = {name: x for name, x in record.items() if name != "step" and isinstance(x, int | float)}
            self._board.write(record["step"], numbers)
        self.records.append(record)

    def advance(self, tokens: int, **shown: float) -> None:
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self.bar.update(tokens)

    def close(self) -> None:
        self.bar.close()
        if not self._writes:
            return
        with storage_errors(self._path), closing(self._file):
            self._board.close()


class _Board:
    """TensorBoard's event file, written where the caller can see it fail (SummaryWriter writes in a thread)."""

    def __init__(self, folder: Path, first_step: int):
        self._events = EventsWriter(str(folder / "events"))
        # What an earlier process logged from this step on is not shown.
        self._events.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()
