"""Jobs and commands for tests of what `jaxhybrid launch` writes."""

import os
import subprocess
from pathlib import Path

from jaxhybrid.launch.job import cloud_job
from jaxhybrid.launch.slices import find_slice
from jaxhybrid.settings.read import load_config

RECIPE = Path(__file__).parents[2] / "configs" / "llama-3.2-3b-instruct.yaml"
IMAGE = "us-docker.pkg.dev/mine/images/jaxhybrid:1"


def make_job(topology="v5p:4x4x4", slices=1, overrides=(), **changes):
    mesh = {"data": slices, "fsdp": -1, "context": 2}
    rows = [f"{stage}.batch_size=96" for stage in ("align", "score", "distill", "finetune", "evaluate")]
    config = load_config(RECIPE, [f"mesh={mesh}", *rows, *overrides])
    options = {"image": IMAGE, "bucket": "my-runs", "nfs": None, "zone": "us-east5-a", "spot": False}
    return cloud_job(config, find_slice(topology), slices, **(options | changes))


class Machine:
    """A shell in which the commands of a cloud are scripts that write down what they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()

    def command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\ncd {self.folder}\necho "{name} $*" >> calls\n{script}\n')
        path.chmod(0o755)

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PROJECT": "mine", "POLL_SECONDS": "0"} | environment
        return subprocess.run(
            ["bash", *map(str, arguments)],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self, *parts: str) -> list[str]:
        """What was asked for that has one of `parts` in it."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if any(part in line for part in parts)]
