"""The folder of one run: what it was made with, which stages are done, and where their results lie.

runs/NAME/
  config.yaml  versions.json
  align/ score/ distill/ finetune/     metrics.jsonl, tensorboard/; checkpoints/ on the way, params/ and done.json after
  scores.json  layers.json  evaluation.json
  select/rounds.json                   of a selection that measures
  prompts/TASK.jsonl                   of tasks with written answers, frozen
  answers/MODEL/TASK.jsonl             what each model wrote, with its score
  export/  report/
"""

import hashlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxhybrid import hosts
from jaxhybrid.checksums import read_result, write_result
from jaxhybrid.errors import ConfigError, DamageError, RunError
from jaxhybrid.files import draft_of, make_folder, remove, remove_stale, storage_errors, write_json, write_text
from jaxhybrid.model.blueprint import Params
from jaxhybrid.settings.compare import UPSTREAM, differences, fingerprint
from jaxhybrid.settings.read import load_config, to_yaml
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import STAGES
from jaxhybrid.train.checkpoint import read_tree, write_tree

PACKAGES = ("jaxhybrid", "jaxhybrid-kernels", "jax", "jaxlib", "optax", "orbax-checkpoint", "grain", "transformers")
PASSING = ("checkpoints", "candidates", "teacher-*")  # what a finished stage does not need any more


class RunFolder:
    """Paths and finished results of a run."""

    def __init__(self, path: Path):
        self.path = path

    @staticmethod
    def open(config: RunConfig) -> "RunFolder":
        """The folder of this config, made if it is new. On many hosts all of them must see it.

        Raises:
            RunError: it holds results of a config that gives others; names the keys that differ. Or hosts do not see
                it.
        """
        folder = RunFolder(folder_of(config))
        hosts.by_first(lambda: folder._prepare(config), "open the run folder")
        hosts.require_shared(folder.path)
        return folder

    def _prepare(self, config: RunConfig) -> None:
        path = make_folder(self.path)
        remove_stale(path / hosts.MARK)
        recorded = path / "config.yaml"
        if recorded.exists() and any((path / stage).exists() for stage in STAGES):
            try:
                earlier = load_config(recorded, [])
            except ConfigError as error:
                reason = str(error).splitlines()[0]
                raise DamageError(
                    f"{recorded} is damaged ({reason}). Delete it to go on with the settings of this command."
                ) from error
            if fingerprint(earlier) != fingerprint(config):
                changed = "\n".join(f"  {line}" for line in differences(earlier, config))
                raise RunError(
                    f"{path} was made with another config:\n{changed}\n"
                    f"`jaxhybrid run {path}` goes on with the settings it was made with. Else give this run another "
                    "`name=` (or run_dir=), or delete the folder to start over. A new run takes over what does not "
                    f"depend on these settings with `jaxhybrid run CONFIG --reuse {path}`."
                )
        write_text(recorded, to_yaml(config))
        if not (path / "versions.json").exists():
            write_json(path / "versions.json", versions())
        for stage in filter(self.is_done, STAGES):
            self._clear(stage)  # where a process was killed while it did

    def stage(self, name: str) -> Path:
        return self.path / name

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished, as the first process sees it."""
        return hosts.by_first((self.stage(stage) / "done.json").exists, f"{stage} is done")

    def finish(self, stage: str, summary: dict[str, Any], params: Params | None = None) -> None:
        """Writes a stage's parameters and marks it done; its checkpoints are then not needed any more, and removed."""
        if params is not None:
            write_tree(self.stage(stage) / "params", params)

        def mark() -> None:
            write_result(self.stage(stage) / "done.json", summary)
            self._clear(stage)

        hosts.by_first(mark, f"finish {stage}")

    def reopen(self, stage: str) -> None:
        """Marks a stage as not done any more."""
        (self.stage(stage) / "done.json").unlink()

    def _clear(self, stage: str) -> None:
        """Removes what a finished stage does not need any more."""
        for pattern in PASSING:
            for path in self.stage(stage).glob(pattern):
                remove(path)

    def load_params(self, stage: str, like: Params) -> Params:
        """Parameters a finished stage left, placed as `like` (arrays or ShapeDtypeStructs with shardings) is."""
        if not self.is_done(stage):
            raise RunError(f"{self.path} has no finished {stage} stage. Run `jaxhybrid {stage} {self.path}`.")
        try:
            params, _ = read_tree(self.stage(stage) / "params", like)
        except RunError as error:
            way_out = f"Delete the folder {self.stage(stage)} to train that stage again"
            raise type(error)(f"{error}. {way_out}.") from error
        return params

    def read(self, name: str, made_by: str) -> Any:
        """A JSON result of the run, or an error naming the verb that makes it."""
        path = self.path / name

        def read() -> Any:
            if not path.exists():
                raise RunError(f"{path} does not exist yet. Run `jaxhybrid {made_by} {self.path}`.")
            return read_result(path, f"Run `jaxhybrid {made_by} {self.path}` again.")

        return hosts.by_first(read, f"read {name}")

    def reuse(self, other: Path) -> dict[str, str]:
        """Takes over the finished align and score stages of another run, where the settings they depend on agree.

        A stage appears here whole or not at all. Large files are linked where the disk allows it, else copied.

        Returns:
            What became of each stage, in words.

        Raises:
            RunError: `other` is no run folder, or this very one.
        """
        if not (other / "config.yaml").exists():
            raise RunError(f"{other} is not a run folder: it has no config.yaml.")
        if other.resolve() == self.path.resolve():
            raise RunError(f"{other} is the folder of this run itself. Give the new run another `name=` (or run_dir=).")
        theirs, ours = (load_config(path / "config.yaml", []) for path in (other, self.path))
        outcome = {}
        for stage in ("align", "score"):
            changed = differences(theirs, ours, UPSTREAM[stage])
            if stage == "score" and ours.score.stop_when_stable:
                chosen_by = ("select.budget:", "select.rank_by:")
                choice = [line for line in differences(theirs, ours, ("select",)) if line.startswith(chosen_by)]
                changed += [f"{line}, which ended scoring" for line in choice]
            if self.is_done(stage):
                outcome[stage] = f"not taken: done already in {self.path}"
            elif not RunFolder(other).is_done(stage):
                outcome[stage] = f"not taken: not finished in {other}"
            elif changed:
                outcome[stage] = "not taken: " + "; ".join(changed)
            else:
                if stage == "score":
                    write_result(self.path / "scores.json", read_result(other / "scores.json"))
                self._take(other / stage)
                outcome[stage] = f"taken from {other}"
        return outcome

    def _take(self, finished: Path) -> None:
        target = self.stage(finished.name)
        with storage_errors(target), draft_of(target) as draft:
            _copy(finished, draft)
            remove(target)  # begun here, not finished
            draft.rename(target)


def folder_of(config: RunConfig) -> Path:
    """Where this config's run is, or would be."""
    return Path(config.run_dir or f"runs/{config.name}").expanduser()


def _copy(finished: Path, target: Path) -> None:
    """A stage's folder without what passes, in links where there can be any."""
    target.mkdir(parents=True)
    for source in sorted(finished.iterdir()):
        if any(source.match(pattern) for pattern in PASSING):
            continue
        if source.is_dir():
            _copy(source, target / source.name)
            continue
        try:
            os.link(source, target / source.name)
        except OSError:  # another disk, or one without links
            shutil.copy2(source, target / source.name)


def versions() -> dict[str, str]:
    """What the run was made with."""
    devices = jax.devices()
    return {
        **package_versions(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def package_versions() -> dict[str, str]:
    """Of what may change results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from a source tree that is not installed
            found[package] = "not installed"
    return found


def source_digest(package: Path = Path(__file__).parent) -> str:
    """Of a package's Python files, this one's unless another is named: checkouts of one version may differ."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
