"""How much memory reading and writing weights takes: a random checkpoint loaded in bfloat16, and exported again.

    python benchmarks/weights_memory.py 7b --folder /a/disk/with/room

The folder takes the checkpoint and its export, four bytes a parameter, and is removed. Loading and exporting run in a
process each, which samples its anonymous memory: what it holds itself, without pages of files. Figures are in copies of
the weights in bfloat16 and count from before the model is loaded.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxhybrid.export.folder import export
from jaxhybrid.families import config_to_hf
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.huggingface import load_teacher
from jaxhybrid.weights.names import FileTensor, file_tensors
from jaxhybrid.weights.safetensors import INDEX_FILE, stored_tensors, stream_safetensors

COMMON = {"family": "qwen2", "qkv_bias": True, "norm_eps": 1e-6, "max_position_embeddings": 4096}
SHAPES = {
    "0.5b": ModelConfig(
        **COMMON, vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
        num_kv_heads=2, head_dim=64, tie_embeddings=True,
    ),
    "1.5b": ModelConfig(
        **COMMON, vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, tie_embeddings=True,
    ),
    "7b": ModelConfig(
        **COMMON, vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_layers=28, num_heads=28,
        num_kv_heads=4, head_dim=128,
    ),
}  # fmt: skip
BF16 = np.dtype(jnp.bfloat16)


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Random bfloat16 weights, a file for each layer."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    files: dict[str, list[FileTensor]] = {}
    for entry in file_tensors(config):
        parts = entry.name.split(".")
        files.setdefault(f"model-{parts[2] if parts[1] == 'layers' else 'ends'}.safetensors", []).append(entry)
    for name, entries in files.items():
        shapes = {entry.name: entry.file_shape for entry in entries}

        def rows(tensor: str, shapes: dict[str, tuple[int, ...]] = shapes) -> list[np.ndarray]:
            bits = rng.integers(0, 1 << 16, int(np.prod(shapes[tensor])), np.uint16)
            return [((bits & 0x807F) | 0x3C00).view(BF16)]  # any sign and fraction, one exponent

        stream_safetensors(folder / name, shapes, dict.fromkeys(shapes, BF16), rows)
    weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config) | {"model_type": "qwen2"}))


def memory(name: str) -> int:
    """Bytes, from /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most anonymous memory of this process while the block runs."""

    def __enter__(self) -> "Peak":
        self.bytes, self._ended = memory("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, memory("RssAnon"))


def measure(what: str, checkpoint: Path, target: Path, results: multiprocessing.Queue) -> None:
    jnp.zeros(()).block_until_ready()
    before = memory("RssAnon")
    with Peak() as peak:
        model = load_teacher(checkpoint, jnp.bfloat16)
    if what == "export":
        with Peak() as peak, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no tokenizer
            export(model, target, "bfloat16")
    results.put((peak.bytes - before, memory("VmHWM"), peak.seconds))


def in_a_process(*arguments: object) -> tuple[int, int, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(*arguments, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files may lie")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    weights = sum(2 * int(np.prod(entry.file_shape)) for entry in file_tensors(config))
    free = shutil.disk_usage(arguments.folder).free
    if free < 2.1 * weights:
        parser.error(f"{arguments.folder} has {free / 1e9:.1f} GB free, {2.1 * weights / 1e9:.1f} are needed")
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_checkpoint(work / "teacher", config)
        print(f"{arguments.shape}: {weights / 1e9:.2f} GB of weights in bfloat16")
        print("| | peak | in copies | VmHWM, with pages of files | seconds |\n|---|---|---|---|---|")
        for what in ("load", "export"):
            peak, high, seconds = in_a_process(what, work / "teacher", work / "export")
            row = f"{peak / 1e9:.2f} GB | {peak / weights:.2f} | {high / 1e9:.2f} GB | {seconds:.0f}"
            print(f"| {what} | {row} |", flush=True)
        before, after = (stored_tensors(work / name) for name in ("teacher", "export"))
        same = all(np.array_equal(before[n].view().view(np.uint16), after[n].view().view(np.uint16)) for n in before)
        print("The export holds the same bits." if same and before.keys() == after.keys() else "THE EXPORT DIFFERS.")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
