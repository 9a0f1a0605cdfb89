"""The figures of every stage's step on a slice, from the cache or from processes that compile."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxhybrid_kernels import api as linear_attention_api

from jaxhybrid.plan.cache import Cache
from jaxhybrid.plan.compiler import find_libtpu, in_worker
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.topology import Topology
from jaxhybrid.run_folder import source_digest


def request(planned: Planned, stage: str, topology: Topology, cache: Path) -> dict[str, Any]:
    """What a worker needs for one stage."""
    return {
        "stage": stage,
        "topology": str(topology),
        "config": planned.config.model_dump(mode="json"),
        "teacher": planned.keys,
        "softmax_layers": list(planned.softmax_layers),
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
    library = find_libtpu() if topology.chip.kind == "tpu" else None
    surroundings = {
        "sources": [source_digest(), source_digest(Path(linear_attention_api.__file__).parent)],
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "libtpu": [library.stat().st_size, library.stat().st_mtime] if library else None,
    }

    def figures(stage: str) -> dict[str, Any]:
        asked = request(planned, stage, topology, cache)
        found = Cache(cache / "requests").get(asked | surroundings, lambda: in_worker(asked, library))
        if compiled := found.get("compiled"):
            tell(f"{topology} {stage}: {compiled['compile_cpu_seconds']:.0f} s of processor time to compile, once")
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(stages, pool.map(figures, stages)))
