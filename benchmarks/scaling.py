"""Several GPUs of one host, measured: training steps, long rows and decoding over 1, 2, 4 or 8 of them.

    python benchmarks/scaling.py weak                     # every stage's step over 1 and all GPUs, with fsdp
    python benchmarks/scaling.py weak --stages distill --gpus 1 2 4 8
    python benchmarks/scaling.py weak --stages distill --gpus 2 --xla-flags= --xla-flags="--xla_gpu_flag=1"
    python benchmarks/scaling.py large                    # the 7B shape over all GPUs: fsdp, and fsdp x tensor
    python benchmarks/scaling.py profile                  # collectives of the distillation step, and what hides them
    python benchmarks/scaling.py context                  # a row of 131,072 tokens over all GPUs; the longest on one
    python benchmarks/scaling.py decode                   # one text, its heads over 1, 2 and 4 GPUs
    python benchmarks/scaling.py processes                # a process a GPU against one for all; one of them is killed
    python benchmarks/scaling.py tables                   # what the other parts wrote, as Markdown

A step is the one that a run compiles (stages/programs.py), with random weights and tokens, in documents of 100 to 400
tokens (--documents); the long row of `context` is one document.
Every measurement is a process of its own, whose peak memory is the measurement's; those on one GPU run on all GPUs at
once. Every part adds its rows to --output (JSON) as it goes. On a machine without a GPU, devices are CPUs
(JAX_NUM_CPU_DEVICES of them), and --shape tiny is there to see that the program works.

NVLink multicast in NCCL is off unless NCCL_NVLS_ENABLE says otherwise, and XLA flags that would use it are refused.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import Any

from gpus import visible_gpus
from output import Output
from shapes import SHAPES

from jaxhybrid.files import write_text
from jaxhybrid.settings.stages import STAGES

JOB = Path(__file__).with_name("scaling_job.py")
ROW = (
    "part", "shape", "stage", "gpus", "mesh", "rows", "length", "documents", "flags", "settings", "device", "jax",
    "harm",
)  # fmt: skip
# Rows a GPU, and their tokens.
SIZES = {"align": (96, 512), "score": (8, 4096), "distill": (8, 4096), "finetune": (2, 16384)}
TINY_SIZES = {"align": (4, 64), "score": (2, 128), "distill": (2, 128), "finetune": (2, 256)}
LONG_ROWS = (131072, 65536, 32768)
MULTICAST = ("symmetric", "multimem", "multicast", "nvshmem", "nvls", "user_buffers", "collective_kernels", "one_shot")
SECONDS = 400  # for one measurement on GPUs


# --- processes


def gpus_here() -> int:
    """Without taking any: they are the children's. CPUs where there is no GPU."""
    if not on_gpus():
        return int(os.environ.get("JAX_NUM_CPU_DEVICES", 1))
    return len(visible_gpus())


def device_name() -> str:
    if not on_gpus():
        return "cpu"
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def on_gpus() -> bool:
    return bool(shutil.which("nvidia-smi")) and os.environ.get("JAX_PLATFORMS") != "cpu"


def environment(gpus: Sequence[int], flags: str = "") -> dict[str, str]:
    """Of a process that sees these GPUs alone, or as many CPUs."""
    own = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    if on_gpus():
        visible = visible_gpus()
        if max(gpus) >= len(visible):
            raise SystemExit(f"{max(gpus) + 1} GPUs are asked for, and {len(visible)} are visible.")
        own["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] for gpu in gpus)
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    else:
        own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(len(gpus))}
    return os.environ | own


def job(work: str, shape: str, mesh: dict[str, int], rows: int, length: int, **given: Any) -> dict[str, Any]:
    """What is asked of scaling_job.py; `rows` of all devices together."""
    stage = given.get("stage") or "distill"
    settings = [f"{stage}.batch_size={rows}", f"{stage}.sequence_length={length}"]
    settings += [f"{name}.kl_chunk={min(2048, rows * length)}" for name in ("score", "distill")]
    settings += [f"mesh.{axis}={mesh.get(axis, 1)}" for axis in ("data", "fsdp", "tensor", "context")]
    return {
        "work": work, "shape": shape, "stage": stage, "mesh": mesh, "rows": rows, "length": length, "flags": "",
        "extra": [], **given, "settings": [*settings, *given.get("extra", [])],
    }  # fmt: skip


def count(asked: dict[str, Any]) -> int:
    devices = 1
    for size in asked["mesh"].values():
        devices *= size
    return devices


def answer(asked: dict[str, Any], gpus: Sequence[int]) -> dict[str, Any]:
    """What a process on these GPUs says; that it failed is an answer, too."""
    command = [sys.executable, str(JOB), json.dumps(asked)]
    kept = {name: asked[name] for name in ("shape", "stage", "rows", "length", "documents", "flags")}
    kept |= {"gpus": len(gpus), "mesh": mesh_text(asked["mesh"]), "settings": " ".join(asked["extra"])}
    try:
        done = subprocess.run(
            command,
            env=environment(gpus, asked["flags"]),
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS if on_gpus() else None,
        )
    except subprocess.TimeoutExpired:
        return kept | {"failed": f"not done after {SECONDS} s"}
    if done.returncode:
        return kept | {"failed": f"exit code {done.returncode}; its messages are above"}
    return kept | json.loads(done.stdout.splitlines()[-1])


def answers(jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those on one GPU first, on all GPUs at once; the others one after the other."""
    free: Queue[int] = Queue()
    for gpu in range(gpus_here()):
        free.put(gpu)

    def alone(asked: dict[str, Any]) -> dict[str, Any]:
        gpu = free.get()
        try:
            return answer(asked, [gpu])
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpus_here()) as pool:
        yield from pool.map(alone, [asked for asked in jobs if count(asked) == 1])
    for asked in jobs:
        if count(asked) > 1:
            yield answer(asked, range(count(asked)))


def mesh_text(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one"


# --- parts


class Parts:
    """Each method is a part: it measures, and adds rows to the output."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.output = options, Output(options.output, ROW)
        self.sizes = TINY_SIZES if options.shape == "tiny" else SIZES
        self.failed = False

    def _measure(self, part: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for row in answers(jobs):
            found.append(row)
            if "failed" in row:
                self.failed = True
                print(f"failed: {row}", flush=True)
            else:
                self.output.add(part, **row)
        return found

    def _common(self, steps: int, warm: int = 2) -> dict[str, Any]:
        return {
            "steps": self.options.steps or steps, "warm": warm, "extra": self.options.set,
            "documents": self.options.documents,
        }  # fmt: skip

    def weak(self) -> None:
        gpus = self.options.gpus or sorted({1, gpus_here()})
        jobs = []
        for flags in self.options.xla_flags:
            for stage in self.options.stages or STAGES:
                rows, length = self.options.rows or self.sizes[stage][0], self.options.length or self.sizes[stage][1]
                jobs += [
                    job("step", self.options.shape, {"fsdp": n}, rows * n, length, stage=stage, flags=flags,
                        **self._common(5))
                    for n in gpus
                ]  # fmt: skip
        self._measure("weak", jobs)

    def large(self) -> None:
        shape = "tiny" if self.options.shape == "tiny" else "qwen2.5-7b-instruct"
        own_rows, length = (
            self.options.rows or self.sizes["distill"][0],
            self.options.length or self.sizes["distill"][1],
        )
        jobs = []
        for n in self.options.gpus or [gpus_here()]:
            meshes = [{"fsdp": n}, *([{"fsdp": n // 2, "tensor": 2}] if n % 2 == 0 else [])]
            for flags in self.options.xla_flags:
                jobs += [
                    job("step", shape, mesh, own_rows * n, length, flags=flags, **self._common(2, warm=1))
                    for mesh in meshes
                ]
        self._measure("large", jobs)

    def profile(self) -> None:
        """Kernels of a command buffer are not told apart in a profile: there are none."""
        jobs = []
        for n in self.options.gpus or [gpus_here()]:
            for stage in self.options.stages or ["distill"]:
                rows, length = self.options.rows or self.sizes[stage][0], self.options.length or self.sizes[stage][1]
                for flags in self.options.xla_flags:
                    flags = f"{flags} --xla_gpu_enable_command_buffer=".strip()
                    jobs.append(
                        job("profile", self.options.shape, {"fsdp": n}, rows * n, length, stage=stage, flags=flags,
                            **self._common(2))
                    )  # fmt: skip
        self._measure("profile", jobs)

    def context(self) -> None:
        """All GPUs take the longest row; one takes the longest that fits."""
        lengths = (1024, 512, 256) if self.options.shape == "tiny" else LONG_ROWS
        lengths = (self.options.length,) if self.options.length else lengths
        several = [n for n in self.options.gpus or [gpus_here()] if n > 1]
        for flags in self.options.xla_flags:
            given = {"flags": flags, **self._common(2, warm=1), "documents": None}
            jobs = [job("step", self.options.shape, {"context": n}, 1, lengths[0], **given) for n in several]
            self._measure("context", jobs)
            for length in lengths:
                (row,) = self._measure("context", [job("step", self.options.shape, {}, 1, length, **given)])
                if "out_of_memory" not in row:
                    break

    def decode(self) -> None:
        length = self.options.length or 1024
        gpus = self.options.gpus or [n for n in (1, 2, 4) if n <= gpus_here()]
        given = self._common(5)
        jobs = [job("decode", self.options.shape, {"tensor": n}, 1, length, **given) for n in gpus]
        self._measure("decode", jobs)

    def processes(self) -> None:
        from scaling_job import SMALL, TINY
        from several_processes import DETERMINISTIC, Failed, measured

        with tempfile.TemporaryDirectory() as made:
            try:
                model = TINY if self.options.shape == "tiny" else SMALL
                folder = self.options.folder or Path(made) / "runs"
                flags = self.options.xla_flags[0] or DETERMINISTIC
                see = partial(environment, flags=flags)
                rows = measured(folder, model, self.options.steps or 300, gpus_here(), see)
            except Failed as error:
                self.failed = True
                print(f"failed: {error}", flush=True)
                return
        for row in rows:
            self.output.add("processes", device=device_name(), jax=version("jax"), flags=flags, **row)

    def tables(self) -> None:
        from scaling_tables import on_page, tables

        texts = tables(self.output.read())
        print("\n\n".join(f"## {part}\n\n{text}" for part, text in texts.items()))
        if page := self.options.page:
            write_text(page, on_page(page.read_text(encoding="utf-8"), texts))


PARTS: dict[str, Callable[[Parts], None]] = {
    name: getattr(Parts, name) for name in ("weak", "large", "profile", "context", "decode", "processes", "tables")
}


def xla_flags(text: str) -> str:
    """Flags of one candidate, none of which uses NVLink multicast."""
    if named := [word for word in MULTICAST if word in text]:
        raise argparse.ArgumentTypeError(f"{text!r}: NVLink multicast stays off, and {named[0]} may use it")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--gpus", nargs="+", type=int, help="how many; each of them is a row")
    parser.add_argument("--shape", default="qwen2.5-1.5b-instruct", choices=[*SHAPES, "tiny"], help="of the teacher")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="of weak (all) and profile (distill)")
    parser.add_argument("--rows", type=int, help="a GPU")
    parser.add_argument("--length", type=int, help="tokens of a row; of the text when decoding")
    parser.add_argument(
        "--documents", nargs=2, type=int, default=[100, 400], metavar=("LEAST", "MOST"), help="tokens of a document"
    )
    parser.add_argument("--steps", type=int, help="that are timed after the first ones")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over all others")
    parser.add_argument(
        "--xla-flags",
        action="append",
        type=xla_flags,
        metavar="FLAGS",
        help="several times: side by side; default none",
    )
    parser.add_argument("--folder", type=Path, help="of the runs of `processes`; default: one that is removed")
    parser.add_argument("--page", type=Path, help="tables: also between the marker lines of this page")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    options = parser.parse_args()
    options.xla_flags = options.xla_flags or [""]
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    parts = Parts(options)
    for part in options.parts:
        if part != "tables":
            print(f"--- {part}, NCCL_NVLS_ENABLE={os.environ['NCCL_NVLS_ENABLE']}", flush=True)
        PARTS[part](parts)
    sys.exit(parts.failed)


if __name__ == "__main__":
    main()
