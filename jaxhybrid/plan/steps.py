"""The figures of every stage's step on a slice, from the cache or from processes that compile."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxhybrid_kernels import api as linear_attention_api

from jaxhybrid.families import hf_to_config
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.plan.cache import Cache
from jaxhybrid.plan.compiler import find_libtpu, in_worker
from jaxhybrid.plan.topology import Topology
from jaxhybrid.run_folder import source_digest
from jaxhybrid.selection.methods import METHODS, select_layers
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.run import RunConfig, validate_against
from jaxhybrid.weights.huggingface import teacher_keys


class Planned:
    """A config with its teacher's sizes: what plans are made of. No text and no weights are opened.

    Attributes:
        softmax_layers: of the hybrid. Where they are not known yet, as many as will be kept, evenly spaced.
        layers_are_known: whether they are the ones that the run will keep.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.keys = teacher_keys(config.teacher)
        self.teacher: ModelConfig = hf_to_config(self.keys, config.ignore_config_keys)
        validate_against(config, self.teacher)
        select, depth = config.select, self.teacher.num_layers
        self.layers_are_known = METHODS[select.method].needs is None
        if self.layers_are_known:
            self.softmax_layers = select_layers(
                select.method,
                depth,
                select.budget,
                layers=select.layers or (),
                seed=select.seed,
                uniform_by=select.uniform,
            )
        else:
            self.softmax_layers = select_layers("uniform", depth, layers_in_budget(select.budget, depth))

    def request(self, stage: str, topology: Topology, cache: Path) -> dict[str, Any]:
        """What a worker needs for one stage: of the config, what the stage's program may depend on."""
        return {
            "stage": stage,
            "topology": str(topology),
            "config": self.config.model_dump(mode="json"),
            "teacher": self.keys,
            "softmax_layers": list(self.softmax_layers),
            "cache": str(cache),
        }


def stage_figures(
    planned: Planned,
    topology: Topology,
    stages: Sequence[str],
    cache: Path,
    jobs: int,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """What `worker.figures` gives for each stage, of which `jobs` are compiled at a time.

    Nothing is traced where neither the config nor any file of this package has changed.
    """
    library = find_libtpu()
    surroundings = {
        "sources": [source_digest(), source_digest(Path(linear_attention_api.__file__).parent)],
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "libtpu": [library.stat().st_size, library.stat().st_mtime],
    }

    def figures(stage: str) -> dict[str, Any]:
        request = planned.request(stage, topology, cache)
        found = Cache(cache / "requests").get(request | surroundings, lambda: in_worker(request))
        if "memory" in found["compiled"]:
            tell(f"{topology} {stage}: {found['compiled']['compile_cpu_seconds']:.0f} s of processor time to compile")
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(stages, pool.map(figures, stages)))
