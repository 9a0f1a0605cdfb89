"""The plan's tables at the head of a recipe, between `# plan: begin` and `# plan: end`: written by this, and checked.

    python benchmarks/recipe_plans.py configs/qwen2.5-3b-instruct.yaml            # plans, and writes the tables
    python benchmarks/recipe_plans.py --check configs/qwen2.5-3b-instruct.yaml    # fails if they are others

They are for the slice of the recipe's `jaxhybrid launch` line, with the teacher's config.json of configs/teachers.
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
from jaxhybrid.plan.recipe import recipe
from jaxhybrid.plan.steps import Steps
from jaxhybrid.plan.table import memory_table, recipe_table, time_table
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.read import load_config

BLOCK = re.compile(r"^# plan: begin\n(?P<table>(?:#.*\n)*?)# plan: end\n", re.MULTILINE)
SLICE = re.compile(r"^# .*--topology (\S+)", re.MULTILINE)
TEACHERS = Path("configs") / "teachers"


def planned_text(path: Path, text: str, jobs: int) -> str:
    """The recipe with the tables that belong there. Raises ConfigError: it has no marker lines, or names no slice."""
    block, where = BLOCK.search(text), SLICE.search(text)
    if block is None or where is None:
        raise ConfigError(f"{path} lacks the lines `# plan: begin` and `# plan: end`, or one with --topology.")
    topology = Topology.parse(where[1])
    planned = Planned(load_config(path, [f"teacher={TEACHERS / path.stem}"]))
    steps = Steps(topology, cache_folder(), jobs, lambda told: print(told, file=sys.stderr))
    figures = steps.figures(planned, list(recipe(planned)))
    parts = [
        f"jaxhybrid plan {path} --topology {topology}. Memory in GiB of a device:",
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
