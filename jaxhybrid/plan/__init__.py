"""What a run would take on chips that are not here: `print_plan`, behind the verb `plan`."""

import json
import sys
from collections.abc import Sequence

from jaxhybrid.errors import ConfigError
from jaxhybrid.plan.cache import cache_folder
from jaxhybrid.plan.steps import Planned, stage_figures
from jaxhybrid.plan.table import steps_table
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import STAGES


def print_plan(config: RunConfig, topologies: Sequence[str], stages: Sequence[str], jobs: int, as_json: bool) -> None:
    """Prints the plan of a config for each topology. Raises ConfigError."""
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stage {stage!r} is none of {', '.join(STAGES)}.")
    slices = [Topology.parse(text) for text in topologies]
    planned = Planned(config)

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    found = {
        str(topology): stage_figures(planned, topology, stages or STAGES, cache_folder(), jobs, tell)
        for topology in slices
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for topology in slices:
        print(f"{config.teacher} on {topology}\n\n{steps_table(found[str(topology)], topology)}\n")
