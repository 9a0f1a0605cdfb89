"""Compiling for TPUs where there is none: libtpu in a process of its own, whose environment stays there.

The process is `python -m jaxhybrid.plan.worker`. It needs libtpu: `find_libtpu`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxhybrid.errors import ConfigError, RunError

LIBTPU = "libtpu.so"


def find_libtpu() -> Path:
    """libtpu's library: what TPU_LIBRARY_PATH names, else that of `make tpu-compiler`, else an installed one.

    Raises:
        ConfigError: there is none; says how to get it.
    """
    named = os.environ.get("TPU_LIBRARY_PATH")
    places = [Path(named)] if named else [Path(sys.prefix) / "tpu-compiler" / "libtpu" / LIBTPU]
    installed = None if named else find_spec("libtpu")
    if installed and installed.submodule_search_locations:
        places.append(Path(installed.submodule_search_locations[0]) / LIBTPU)
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"Compiling for a TPU needs libtpu, which is not at {' or '.join(map(str, places))}. In a checkout: `make "
        "tpu-compiler`. Elsewhere: `pip install --target DIR libtpu`, and set TPU_LIBRARY_PATH=DIR/libtpu/libtpu.so "
        "(Linux on x86-64). No TPU is needed, and libtpu need not be where Python finds it."
    )


def environment(libtpu: Path | None) -> dict[str, str]:
    """Of the process that compiles with libtpu, or that traces only. Some of it keeps JAX from finding a TPU that is
    there: it must not be set here."""
    own = os.environ | {"JAX_PLATFORMS": "cpu"}
    if libtpu is None:
        return own
    return own | {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LIBRARY_PATH": str(libtpu),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


def compiler_settings() -> dict[str, str]:
    """What the environment sets of JAX and its compilers: it may make other programs. Empty where it sets nothing."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") or name.startswith("JAX_"))
        and name != "JAX_PLATFORMS"  # `environment` sets it
        and not name.startswith("JAX_COMPILATION_CACHE")
    }


def in_worker(request: dict[str, Any], libtpu: Path | None) -> dict[str, Any]:
    """What `worker` answers to a request.

    Raises:
        ConfigError: the config does not go with the slice.
        RunError: the process ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "jaxhybrid.plan.worker", str(answer)],
            input=json.dumps(request),
            env=environment(libtpu),
            capture_output=True,
            text=True,
        )
        if not answer.exists():
            told = "\n".join(done.stderr.strip().splitlines()[-20:])
            killed = " It was killed, perhaps for want of memory." if done.returncode == -9 else ""
            raise RunError(f"Planning {request['stage']} ended with code {done.returncode}.{killed}\n{told}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise ConfigError(f"{request['stage']} on {request['topology']}: {found['error']}")
    return found


_SIZE = re.compile(r"([\d.]+)([KMGT])")
_OUT_OF_MEMORY = re.compile(
    r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm|\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"
)


def out_of_memory(text: str) -> tuple[float, float] | None:
    """(bytes that a program needs, bytes that there are), of a compiler's error; None if it is another one."""
    found = _OUT_OF_MEMORY.search(text)
    if not found:
        return None
    needed, available = (part for part in found.groups() if part)
    return _bytes(needed), _bytes(available)


def _bytes(text: str) -> float:
    found = _SIZE.fullmatch(text)
    assert found, text
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
