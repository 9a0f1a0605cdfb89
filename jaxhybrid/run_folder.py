"""The folder of one run: what it was made with, which stages are done, and where their results lie.

runs/NAME/
  config.yaml  versions.json
  align/ score/ distill/ finetune/     checkpoints/, metrics.jsonl, tensorboard/, params/ and done.json when finished
  scores.json  layers.json  evaluation.json
  export/  report/
"""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxhybrid.config import RunConfig, differences, fingerprint, load_config, to_yaml
from jaxhybrid.errors import RunError
from jaxhybrid.files import make_folder, read_json, storage_errors, write_json, write_text
from jaxhybrid.model.params import Params

PACKAGES = ("jaxhybrid", "jaxhybrid-kernels", "jax", "jaxlib", "optax", "orbax-checkpoint", "grain", "transformers")
TRAINED_STAGES = ("align", "distill", "finetune")


class RunFolder:
    """Paths and finished results of a run."""

    def __init__(self, path: Path):
        self.path = path

    @staticmethod
    def open(config: RunConfig) -> "RunFolder":
        """The folder of this config, made if it is new.

        Raises:
            RunError: it was made by a config that gives other results; names the keys that differ.
        """
        path = make_folder(Path(config.run_dir or f"runs/{config.name}").expanduser())
        recorded = path / "config.yaml"
        if recorded.exists():
            earlier = load_config(recorded, [])
            if fingerprint(earlier) != fingerprint(config):
                changed = "\n".join(f"  {line}" for line in differences(earlier, config))
                raise RunError(
                    f"{path} was made with another config:\n{changed}\n"
                    "Give this run another `name=` (or run_dir=), or delete the folder to start over."
                )
        write_text(recorded, to_yaml(config))
        if not (path / "versions.json").exists():
            write_json(path / "versions.json", versions())
        return RunFolder(path)

    def stage(self, name: str) -> Path:
        return self.path / name

    def is_done(self, stage: str) -> bool:
        return (self.stage(stage) / "done.json").exists()

    def finish(self, stage: str, summary: dict[str, Any], params: Params | None = None) -> None:
        """Writes a stage's parameters and marks it done; its checkpoints are then not needed any more."""
        if params is not None:
            with storage_errors(self.stage(stage)):
                ocp.save(self.stage(stage).absolute() / "params", params, overwrite=True)
        write_json(self.stage(stage) / "done.json", summary)

    def load_params(self, stage: str, like: Params) -> Params:
        """Parameters a finished stage left, placed as `like` (arrays or ShapeDtypeStructs with shardings) is."""
        if not self.is_done(stage):
            raise RunError(
                f"{self.path} has no finished {stage} stage. Run `jaxhybrid {stage} {self.path / 'config.yaml'}`."
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return ocp.load(self.stage(stage).absolute() / "params", abstract)

    def read(self, name: str, made_by: str) -> Any:
        """A JSON result of the run, or an error naming the verb that makes it."""
        path = self.path / name
        if not path.exists():
            raise RunError(f"{path} does not exist yet. Run `jaxhybrid {made_by} {self.path / 'config.yaml'}`.")
        return read_json(path)


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from a source tree that is not installed
            found[package] = "not installed"
    devices = jax.devices()
    return found | {"devices": f"{len(devices)} x {devices[0].device_kind}"}


def describe(path: Path) -> str:
    """What a run folder holds, for people."""
    if not (path / "config.yaml").exists():
        raise RunError(f"{path} is not a run folder: it has no config.yaml.")
    lines = [f"{path}"]
    for stage in ("align", "score", "distill", "finetune"):
        done = path / stage / "done.json"
        if done.exists():
            lines.append(f"  {stage:9} done      {json.dumps(read_json(done))}")
        elif (path / stage).exists():
            lines.append(f"  {stage:9} started")
        else:
            lines.append(f"  {stage:9} -")
    for name in ("layers.json", "evaluation.json"):
        if (path / name).exists():
            lines.append(f"  {name}: {json.dumps(read_json(path / name))}")
    for name in ("export", "report"):
        lines.append(f"  {name:9} {'written' if (path / name).exists() else '-'}")
    return "\n".join(lines)
