"""Tests that compile for TPUs on a machine without one: each is a file, run in a process that has the compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIBTPU = Path(sys.prefix) / "tpu-compiler/libtpu/libtpu.so"
needs_libtpu = pytest.mark.skipif(not LIBTPU.exists(), reason="libtpu is not here: `make tpu-compiler`")


def printed_with_compiler(file: str) -> Any:
    """The JSON that `python file` prints."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LIBRARY_PATH": str(LIBTPU),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
