"""What a run would take on chips that are not here: `print_plan`, behind the verb `plan`."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.plan import serving, surgery
from jaxhybrid.plan.cache import cache_folder
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.steps import stage_figures
from jaxhybrid.plan.table import model_screen, slice_tables
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import STAGES


def print_plan(config: RunConfig, topologies: Sequence[str], stages: Sequence[str], jobs: int, as_json: bool) -> None:
    """Prints what becomes of the model, then the plan for each topology. Raises ConfigError."""
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stage {stage!r} is none of {', '.join(STAGES)}.")
    slices = [Topology.parse(text) for text in topologies]
    planned = Planned(config)
    if not as_json:
        print(model_screen(planned), flush=True)

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    found: dict[str, Any] = {"model": surgery.as_json(planned), "serving": serving.as_json(planned), "topologies": {}}
    for topology in slices:
        figures = stage_figures(planned, topology, stages or STAGES, cache_folder(), jobs, tell)
        found["topologies"][str(topology)] = figures
        if not as_json:
            print(f"\n{slice_tables(planned, figures, topology)}", flush=True)
    if as_json:
        print(json.dumps(found, indent=2))
