"""How much disk a run takes at most, said before a stage begins, and refused when there is less."""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from jaxhybrid.errors import RunError
from jaxhybrid.model.blueprint import count_parameters, variables
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.selection.methods import METHODS
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import StageConfig

MASTER_BYTES = 4


@dataclass(frozen=True)
class Need:
    """Something that lies on the disk while a stage runs."""

    what: str
    bytes: int
    way_out: str = ""  # the settings that make it less
    stays: bool = False  # when the stage is done


def total(needs: Iterable[Need]) -> int:
    return sum(need.bytes for need in needs)


class DiskPlan:
    """What each stage of a run needs, by arithmetic; logs and the token cache are not in it."""

    def __init__(self, config: RunConfig, linear: ModelConfig):
        """`linear` is the student with no softmax layer."""
        kept = layers_in_budget(config.select.budget, linear.num_layers)
        hybrid = linear.with_layers((FULL_ATTENTION,) * kept + linear.layer_types[kept:])  # whichever layers they are
        self.config, self.depth, self.width = config, linear.num_layers, linear.hidden_size
        self.mixers = count_parameters(model_variables(linear)["mixers"])
        self.student = count_parameters(model_variables(hybrid))
        attention = count_parameters(variables(MIXERS[FULL_ATTENTION], linear))
        self.candidate = count_parameters(model_variables(linear)) + attention

    def needs(self, stage: str, candidates: Sequence[int] | None = None) -> list[Need]:
        """Of one stage, all at the same time; `candidates`: the layers that this process scores, None for all."""
        if stage == "score":
            return self._score(self.depth if candidates is None else len(candidates))
        if stage == "export":
            bytes_each = jnp.dtype(self.config.export.dtype).itemsize
            return [Need("weights", self.student * bytes_each, "export.folder may be on another disk", stays=True)]
        count = self.mixers if stage == "align" else self.student
        settings: StageConfig = getattr(self.config, stage)
        return [_checkpoints(stage, settings, count), Need("parameters", count * MASTER_BYTES, stays=True)]

    def most(self, stages: Sequence[str]) -> tuple[str, list[Need]]:
        """Of these stages one after the other: the one at which most lies on the disk, and what that is."""
        earlier, found = 0, [("", 0, list[Need]())]
        for stage in stages:
            needs = self.needs(stage)
            results = [Need("results of earlier stages", earlier)] if earlier else []
            found.append((stage, earlier + total(needs), [*results, *needs]))
            earlier += total(need for need in needs if need.stays)
        stage, _, needs = max(found, key=lambda item: item[1])
        return stage, needs

    def require_stage(self, stage: str, folder: Path, candidates: Sequence[int] | None = None) -> None:
        """`require` for one stage in `folder`."""
        require(stage, self.needs(stage, candidates), used_bytes([folder]), folder)

    def require_run(self, folder: Path, undone: Sequence[str]) -> None:
        """`require` for the run in `folder`, of whose stages these are not done."""
        is_scored = METHODS[self.config.select.method].needs == "scores"
        stages = [stage for stage in undone if stage != "score" or is_scored]
        if stages:
            there = used_bytes(folder / stage for stage in stages)
            exported = [] if self.config.export.folder else ["export"]
            stage, needs = self.most([*stages, *exported])
            require(f"the run, most of it at {stage},", needs, there, folder)

    def _score(self, candidates: int) -> list[Need]:
        settings = self.config.score
        batch = settings.tokens_per_step * self.width * jnp.dtype(self.config.dtype).itemsize
        heldout = math.ceil(settings.heldout_tokens / settings.tokens_per_step)
        needs = [Need("held-out teacher states", heldout * batch, "lower score.heldout_tokens")]
        if settings.keep_teacher_states:
            way_out = "score.keep_teacher_states=false keeps none and runs the teacher again for every layer"
            needs.append(Need("teacher states", settings.steps * batch, way_out))
        if settings.stop_when_stable:
            bytes_each = settings.state_bytes * jnp.dtype(settings.kept_dtype).itemsize // MASTER_BYTES
            way_out = (
                "score.kept_dtype=bfloat16 halves it; score.stop_when_stable=null needs none, and every layer then "
                "takes all of score.tokens"
            )
            needs.append(Need(f"{candidates} waiting candidates", candidates * self.candidate * bytes_each, way_out))
        saves = settings.steps // settings.checkpoint_every
        if saves:
            needs.append(_checkpoints("score", settings, self.candidate, saves))
        return needs


def _checkpoints(stage: str, settings: StageConfig, count: int, saves: int | None = None) -> Need:
    saves = math.ceil(settings.steps / settings.checkpoint_every) if saves is None else saves
    present = min(saves, settings.keep_checkpoints + 1)  # one is written before the oldest goes
    way_out = f"{stage}.checkpoint_every={settings.steps} keeps one, and a stop costs more" if present > 1 else ""
    return Need(f"{present} checkpoint{'s' * (present > 1)}", present * count * settings.state_bytes, way_out)


def require(name: str, needs: Sequence[Need], there: int, path: Path) -> None:
    """Says what `name` needs at `path`, of which `there` bytes are there already.

    Raises:
        RunError: so much is not free; names the numbers and the settings that make it less.
    """
    most, free = total(needs), free_bytes(path)
    parts = ", ".join(f"{size_text(need.bytes)} {need.what}" for need in needs)
    if most - there <= free:
        print(f"{name}: at most {size_text(most)} of disk ({parts}); {size_text(free)} are free at {path}")
        return
    less = "".join(f"\n  {size_text(need.bytes)} {need.what}: {need.way_out}" for need in needs if need.way_out)
    raise RunError(
        f"{name} takes up to {size_text(most)} of disk ({parts}), {size_text(there)} of it taken already; "
        f"{size_text(free)} are free at {path}. Free some, choose another run_dir, or make it less:{less}"
    )


def free_bytes(path: Path) -> int:
    """On the disk where `path` is, or would be."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def used_bytes(folders: Iterable[Path]) -> int:
    """What lies in them on the disk; 0 for those that are not there."""
    walks = (walk for folder in folders for walk in os.walk(folder))
    return sum(_blocks(os.path.join(folder, name)) for folder, _, files in walks for name in files)


def _blocks(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:  # a run is at work there
        return 0


def size_text(size: float) -> str:
    """'1.29 TB', in powers of ten as disks are sold."""
    power = 0
    while size >= 999.5 and power < 5:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
