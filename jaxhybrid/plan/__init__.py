"""What a run would take on chips that are not here: `print_plan`, behind the verb `plan`."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.plan import serving, surgery
from jaxhybrid.plan.cache import cache_folder
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.recipe import recipe
from jaxhybrid.plan.steps import Steps
from jaxhybrid.plan.table import model_screen, slice_tables, suggestions_text
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.stages import STAGES


def print_plan(
    config: RunConfig, topologies: Sequence[str], stages: Sequence[str], jobs: int, as_json: bool, suggest: bool
) -> None:
    """Prints what becomes of the model, then the plan for each topology. Raises ConfigError.

    Args:
        stages: none: those that a run of the config has.
    """
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"--stage {stage!r} is none of {', '.join(STAGES)}.")
    slices = [Topology.parse(text) for text in topologies]
    planned = Planned(config)
    wanted = stages or list(recipe(planned))

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    say(model_screen(planned))
    found: dict[str, Any] = {
        "model": surgery.as_json(planned),
        "serving": serving.as_json(serving.serving(planned)),
        "topologies": {},
    }
    for topology in slices:
        steps = Steps(topology, cache_folder(), jobs, lambda text: print(text, file=sys.stderr))
        if suggest:
            choices = {stage: steps.suggestion(planned, stage) for stage in wanted}
            found["topologies"][str(topology)] = choices
            say(f"\n{suggestions_text(choices, topology)}")
        else:
            figures = steps.figures(planned, wanted)
            found["topologies"][str(topology)] = figures
            say(f"\n{slice_tables(planned, figures, topology)}")
    if as_json:
        print(json.dumps(found, indent=2))
