"""One process a GPU: the losses of one process for all of them, and what follows when one is killed. For scaling.py.

Runs of a small random model through the command line, on text that is made here. Programs are compiled without what
differs from start to start (autotuning, sums in the order of arrival), so that runs can be compared bit by bit.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stage_steps import ROOT

sys.path.insert(0, str(ROOT))  # for `tests`, which makes runs of small models

from jaxhybrid.families import config_to_hf
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.transformer import random_params
from jaxhybrid.weights.save import save_weights
from tests.runs import exported, free_port, records, write_text
from tests.tiny import stage, write_config, write_tokenizer

DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
EVERY = 10  # steps between checkpoints
LENGTH = 256  # tokens of a row
SECONDS = 600  # for a start
TRAINED = ("align", "distill", "finetune")


Environment = Callable[[Sequence[int]], dict[str, str]]  # of a process that may use these GPUs


class Failed(Exception):
    """A run ended otherwise than it must; with the end of its log."""


class Runs:
    """A teacher, text and a config in a folder, and runs of them by any number of processes."""

    def __init__(self, folder: Path, model: ModelConfig, steps: int, gpus: int, environment: Environment):
        self.folder, self.steps, self.gpus, self.environment = folder, steps, gpus, environment
        self.started: list[subprocess.Popen[bytes]] = []
        teacher = folder / "teacher"
        teacher.mkdir(parents=True)
        write_tokenizer(teacher)
        params = jax.jit(lambda key: random_params(model, key))(jax.random.key(7))
        save_weights(params, model, teacher, jnp.dtype(jnp.float32))
        hf = config_to_hf(model) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": 0}
        (teacher / "config.json").write_text(json.dumps(hf))
        rows = 2 * gpus
        own = {"sequence_length": LENGTH, "batch_size": rows, "log_every": 1, "checkpoint_every": EVERY}
        write_config(
            folder / "config.yaml",
            teacher,
            dtype="bfloat16",
            data={"train": str(write_text(folder / "text.jsonl")), "heldout_tokens": 2048},
            select={"method": "uniform", "budget": 1},
            align=stage(**own | {"tokens": 20 * rows * LENGTH}),
            distill=stage(**own | {"tokens": steps * rows * LENGTH}),
            finetune=stage(**own | {"tokens": 20 * rows * LENGTH}),
        )

    def log(self, run: str, number: int) -> Path:
        return self.folder / f"{run}-{number}.log"

    def start(self, run: str, processes: int) -> list[subprocess.Popen[bytes]]:
        """One process for all GPUs, or as many as there are GPUs, one each."""
        port, running = free_port(), []
        for number in range(processes):
            environment = self.environment(range(self.gpus))
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.2"  # several runs are on a GPU at once
            joined: list[Any] = ["--processes", 1]
            if processes > 1:
                joined = ["--coordinator", f"localhost:{port}", "--processes", processes, "--process", number]
                environment["JAX_LOCAL_DEVICE_IDS"] = str(number)
            if environment.get("JAX_PLATFORMS") == "cpu":
                environment["JAX_NUM_CPU_DEVICES"] = str(self.gpus // processes)
            places = [f"run_dir={self.folder / run}", f"data.cache_dir={self.folder / f'{run}-tokens'}"]
            command = ["run", self.folder / "config.yaml", *places, *joined]
            code = "from jaxhybrid.cli import main; main()"
            with self.log(run, number).open("a") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, *map(str, command)], env=environment, stdout=log, stderr=log
                    )
                )
        self.started += running
        return running

    def end(self, run: str, running: list[subprocess.Popen[bytes]]) -> None:
        """Waits for processes that must succeed."""
        try:
            codes = [process.wait(SECONDS) for process in running]
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{run}: not at its end after {SECONDS} s") from error
        if any(codes):
            number = next(number for number, code in enumerate(codes) if code)
            raise Failed(f"{run}: exit codes {codes}\n{self.log(run, number).read_text()[-3000:]}")


def measured(folder: Path, model: ModelConfig, steps: int, gpus: int, environment: Environment) -> list[dict[str, Any]]:
    """Rows of both measurements; `steps` are of distillation, after a third of which one process is killed.

    Raises:
        Failed: a process that is not killed ends with an error, or one lives on after another is killed.
    """
    jax.config.update("jax_platforms", "cpu")  # the GPUs are the children's
    runs = Runs(folder, model, steps, gpus, environment)
    try:
        beside = {"one": runs.start("one", 1), "each": runs.start("each", gpus)}
        harm = kill_one(runs, "killed")
        for run, running in beside.items():
            runs.end(run, running)
        runs.end("killed", runs.start("killed", gpus))
    finally:
        for process in runs.started:
            process.kill()

    results = {run: result(folder / run) for run in ("one", "each", "killed")}
    losses = {run: found["losses"] for run, found in results.items()}
    differences = np.abs(losses["each"] - losses["one"]) / np.abs(losses["one"])
    whole, resumed = results["each"], results["killed"]
    equal = whole.keys() == resumed.keys() and all(np.array_equal(whole[key], resumed[key]) for key in whole)
    common = {"gpus": gpus, "length": LENGTH, "rows": 2 * gpus}
    return [
        common | {"harm": "none", "steps": len(losses["one"]), "equal_steps": int(np.sum(differences == 0)),
                  "largest_relative_difference": float(differences.max())},
        common | {"harm": "one killed", **harm, "equal_to_undisturbed": equal},
    ]  # fmt: skip


def kill_one(runs: Runs, run: str) -> dict[str, Any]:
    """Distills until one process is killed; how long the others lived, and what the first one said."""
    running = runs.start(run, runs.gpus)
    until = time.monotonic() + SECONDS
    while len(records(runs.folder / run / "distill")) < runs.steps // 3:
        if time.monotonic() > until or any(process.poll() is not None for process in running):
            runs.end(run, running)
            raise Failed(f"{run}: at its end before it was killed; it takes more than {runs.steps} steps")
        time.sleep(0.02)
    running[-1].send_signal(signal.SIGKILL)
    said_before = len(runs.log(run, 0).read_text())
    began = time.monotonic()
    try:
        codes = [process.wait(SECONDS) for process in running]
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{run}: a process lived on for {SECONDS} s after another one was killed") from error
    said = [line for line in runs.log(run, 0).read_text()[said_before:].splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return {
        "seconds_to_end": time.monotonic() - began,
        "exit_codes": codes,
        "steps_done": len(records(runs.folder / run / "distill")),
        "lines_said": len(said),
        "errors_said": errors,
    }


def result(run: Path) -> dict[str, np.ndarray]:
    """The losses of all steps, and the exported weights."""
    losses = [record["loss"] for name in TRAINED for record in records(run / name)]
    return {"losses": np.array(losses), **exported(run)}
