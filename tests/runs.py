"""Whole runs of the tiny teacher, each in a process of its own, as a user starts them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxhybrid.train.metrics import read_metrics
from tests.tiny import stage, write_config, write_teacher

# No torch, as on most machines that train: the library must not need it. Levels of optimisation do not matter here.
START = "import sys; sys.modules['torch'] = None\nfrom jaxhybrid.cli import main\n"
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Once `label` has recorded `step`, the process gets the signal some moments later, in the middle of whatever it does.
INTERRUPT = """
import os, threading
from jaxhybrid.train import loop

class Recorder(loop.Recorder):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.armed = settings["label"].startswith({label!r})

    def write(self, record):
        super().write(record)
        if self.armed and record["step"] >= {step}:
            self.armed = False
            threading.Timer({delay}, os.kill, (os.getpid(), {number})).start()

loop.Recorder = Recorder
"""


class Workshop:
    """A folder with teacher, text and config, and processes that share compiled programs."""

    def __init__(self, folder: Path):
        self.folder, self.config, self.run = folder, folder / "config.yaml", folder / "run"

    def prepare(self) -> None:
        teacher = write_teacher(self.folder / "teacher")
        write_text(self.folder / "text.jsonl")
        write_config(
            self.config,
            teacher,
            data={
                "train": str(self.folder / "text.jsonl"),
                "heldout_tokens": 2048,
                "cache_dir": str(self.folder / "tokens"),
            },
            align=stage(tokens=8 * 64 * 10, checkpoint_every=3, log_every=1),
            score=stage(
                tokens=8 * 64 * 6, budgets=[1, 2], heldout_tokens=500, evaluate_every=3, checkpoint_every=2, log_every=4
            ),
            distill=stage(tokens=8 * 64 * 10, checkpoint_every=3, log_every=1),
            finetune=stage(tokens=8 * 64 * 6, checkpoint_every=2, log_every=1),
        )

    def start(self, *arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", f"{START}{before}\nmain()", *map(str, arguments)],
            env=os.environ | self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=400,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "XLA_FLAGS": XLA_FLAGS,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def finish(self, *arguments: str | Path) -> str:
        """Starts a process that must succeed; what it printed."""
        done = self.start(*arguments)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def interrupt(self, label: str, step: int, number: signal.Signals, delay: float, *arguments: str | Path):
        """Starts a process that gets signal `number` `delay` seconds after `label` recorded `step`."""
        return self.start(*arguments, before=INTERRUPT.format(label=label, step=step, delay=delay, number=int(number)))


def write_text(path: Path, documents: int = 600) -> Path:
    rng = random.Random(0)
    names = ["anna", "bert", "carl", "dora", "emil", "fritz", "gina", "hans"]
    verbs = ["likes", "sees", "calls", "finds", "meets", "asks"]

    def sentence() -> str:
        return f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(names)} and has the number {rng.randrange(1000)}."

    lines = (json.dumps({"text": " ".join(sentence() for _ in range(3))}) for _ in range(documents))
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path):
    return json.loads(path.read_text())


def exported(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "export" / "model.safetensors")


def records(folder: Path) -> list[dict]:
    """What a stage recorded, without how fast it was."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_second"}
        for record in read_metrics(folder)
    ]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def close(ours, theirs):
    """Equal to rounding: the devices' sums are in another order."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"checksum", "hardware"}:
            close(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for own, value in zip(ours, theirs):
            close(own, value)
    elif isinstance(theirs, np.ndarray):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=3e-5, abs=1e-7)
    else:
        assert ours == theirs


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
