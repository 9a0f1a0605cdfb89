"""The figures of every stage's step on a slice, from the cache or from processes that compile."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxhybrid_kernels import api as linear_attention_api

from jaxhybrid.plan.cache import Cache
from jaxhybrid.plan.compiler import compiler_settings, find_libtpu, in_worker
from jaxhybrid.plan.memory import Memory
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.topology import Topology
from jaxhybrid.run_folder import source_digest
from jaxhybrid.settings.read import parse_config


class Steps:
    """Asks workers, `jobs` at a time, and keeps their answers in `cache`.

    Nothing is traced where neither the config nor any file of this package has changed.
    """

    def __init__(self, topology: Topology, cache: Path, jobs: int, tell: Callable[[str], None] = lambda text: None):
        """Raises ConfigError: libtpu is needed and not here."""
        self.topology, self.cache, self.jobs, self.tell = topology, cache, jobs, tell
        self.library = find_libtpu() if topology.chip.kind == "tpu" else None

    def figures(self, planned: Planned, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What `worker.figures` gives for each stage."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(stages, pool.map(partial(self._figures, planned), stages)))

    def _figures(self, planned: Planned, stage: str) -> dict[str, Any]:
        found = self._ask(planned, stage, suggest=False)
        if compiled := found.get("compiled"):
            seconds = compiled["compile_cpu_seconds"]
            self.tell(f"{self.topology} {stage}: {seconds:.0f} s of processor time to compile, once")
        return found

    def suggestion(self, planned: Planned, stage: str) -> dict[str, Any] | None:
        """The fastest choice of mesh, recomputation and accumulation that fits, of TPUs by the compiler; None: none
        does. Those that are estimated to fit are compiled one after the other, the fastest first, until one does."""
        choices: list[dict[str, Any]] = self._ask(planned, stage, suggest=True)["choices"]
        for number, choice in enumerate(choices, start=1):
            tree = planned.config.model_dump(mode="json")
            for key, value in choice["settings"].items():
                section, name = key.split(".")
                tree[section][name] = value
            memory = Memory.of(self._figures(Planned(parse_config(tree)), stage), self.topology)
            if memory.fits:
                return choice | {"gib": memory.all}
            self.tell(
                f"{self.topology} {stage}: choice {number} of {len(choices)} that were estimated to fit takes "
                f"{memory.all:.2f} GiB and does not"
            )
        return None

    def _ask(self, planned: Planned, stage: str, suggest: bool) -> dict[str, Any]:
        request = {
            "stage": stage,
            "topology": str(self.topology),
            "config": planned.config.model_dump(mode="json"),
            "teacher": planned.keys,
            "softmax_layers": list(planned.softmax_layers),
            "cache": str(self.cache),
            "suggest": suggest,
        }
        library = self.library
        surroundings: dict[str, Any] = {
            "sources": [source_digest(), source_digest(Path(linear_attention_api.__file__).parent)],
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "libtpu": [library.stat().st_size, library.stat().st_mtime] if library else None,
        }
        if settings := compiler_settings():
            surroundings["environment"] = settings
        return Cache(self.cache / "requests").get(request | surroundings, lambda: in_worker(request, library))
