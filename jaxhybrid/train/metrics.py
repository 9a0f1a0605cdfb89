"""What a stage measures, in three places at once: a JSONL file, TensorBoard, and the progress bar."""

import json
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxhybrid.files import make_folder, storage_errors, write_text

Record = dict[str, Any]  # {"step": 12, "tokens": 4096, "loss": ...}: plain numbers and short lists of them


def read_metrics(folder: Path) -> list[Record]:
    """The records of `folder/metrics.jsonl`, oldest first; none if there is no file."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A killed process may leave half a last line; it belongs to a step that will be run again.
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Recorder:
    """Records of one stage. Opening it again at a step forgets what was recorded after that step."""

    def __init__(self, folder: Path, *, resume_step: int, total_tokens: int, done_tokens: int, label: str):
        make_folder(folder)
        kept = [record for record in read_metrics(folder) if record["step"] <= resume_step]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        self._path = folder / "metrics.jsonl"
        self._file: TextIO = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        self.bar = tqdm(
            total=total_tokens, initial=done_tokens, desc=label, unit="tok", unit_scale=True, dynamic_ncols=True
        )

    def write(self, record: Record) -> None:
        with storage_errors(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])

    def advance(self, tokens: int, **shown: float) -> None:
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self.bar.update(tokens)

    def close(self) -> None:
        self.bar.close()
        self._board.close()
        self._file.close()
