"""The plan's table at the head of a recipe: written by this, and checked.

    python benchmarks/recipe_plans.py configs/qwen2.5-3b-instruct.yaml            # plans, and writes the table
    python benchmarks/recipe_plans.py --check configs/qwen2.5-3b-instruct.yaml    # fails if it is another one

The table stands in comments between the two marker lines. The first says for which slice and with which settings it is
made, in the words of `jaxhybrid plan`:

    # plan: v5p:4x4x4 mesh.fsdp=32 mesh.context=2 teacher=configs/teachers/qwen2.5-3b-instruct
    # end of plan

Programs that were compiled before are not compiled again, so that a check takes seconds.
"""

import argparse
import re
import sys
from pathlib import Path

from jaxhybrid.errors import ConfigError
from jaxhybrid.files import write_text
from jaxhybrid.plan.cache import cache_folder
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.steps import Steps
from jaxhybrid.plan.table import memory_table, recipe_table, time_table
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import STAGES

BLOCK = re.compile(r"^# plan: (?P<words>\S.*)\n(?P<table>(?:#.*\n)*?)# end of plan\n", re.MULTILINE)


def planned_text(path: Path, text: str, jobs: int) -> str:
    """The recipe with the table that belongs there. Raises ConfigError: it has no marker lines."""
    block = BLOCK.search(text)
    if block is None:
        raise ConfigError(f"{path} has no line `# plan: TOPOLOGY [KEY=VALUE]...` with `# end of plan` below it.")
    where, *overrides = block["words"].split()
    topology, planned = Topology.parse(where), Planned(load_config(path, overrides))
    figures = Steps(topology, cache_folder(), jobs, lambda told: print(told, file=sys.stderr)).figures(planned, STAGES)
    parts = [
        "Memory in GiB of a device:",
        memory_table(figures, topology),
        "A step in ms:",
        time_table(planned, figures, topology),
        recipe_table(planned, figures, topology),
    ]
    lines = [f"# {line}".rstrip() for line in "\n\n".join(parts).splitlines()]
    table = "\n".join(lines) + "\n"
    return text[: block.start("table")] + table + text[block.end("table") :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is another one")
    parser.add_argument("--jobs", type=int, default=2, help="stages compiled at a time")
    given = parser.parse_args()
    differing = []
    for path in given.recipes:
        text = path.read_text(encoding="utf-8")
        found = planned_text(path, text, given.jobs)
        if found != text:
            differing.append(str(path))
            if not given.check:
                write_text(path, found)
    if given.check and differing:
        sys.exit(f"The plan is another one now: {', '.join(differing)}. Run this without --check.")


if __name__ == "__main__":
    main()
