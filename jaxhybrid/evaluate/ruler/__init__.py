"""RULER's thirteen tasks (arXiv 2404.06654), as NVIDIA/RULER builds them; docs/evaluation.md says what is different.

A new task is a file like `cwe.py`, a line here, and its name in `settings/evaluate.py`.
"""

from functools import partial
from pathlib import Path

from jaxhybrid.evaluate.prompts import Asker, PromptSet, frozen
from jaxhybrid.evaluate.ruler import cwe, fwe, niah, qa, vt
from jaxhybrid.evaluate.ruler.fit import write_prompts
from jaxhybrid.evaluate.ruler.task import Materials, Task
from jaxhybrid.settings.evaluate import RulerConfig

TASKS: dict[str, Task] = {task.name: task for file in (niah, vt, cwe, fwe, qa) for task in file.TASKS}
FORM = 2  # raised when the same settings would give other prompts


def ruler_prompts(settings: RulerConfig, asker: Asker, folder: Path) -> list[PromptSet]:
    """The prompts of every task at every length, frozen in files of `folder`.

    Raises:
        ConfigError: a length is too short for a task.
        DataError: a file that a task is made from is missing, or is not what it should be.
    """
    materials, sets = Materials(settings, asker), []
    for length in settings.lengths:
        for name in settings.tasks:
            task = TASKS[name]
            made_from = {
                "form": FORM,
                "task": name,
                "length": length,
                "samples": settings.samples,
                "depths": list(settings.depths),
                "seed": settings.seed,
                "tokens": asker.fingerprint,
                "files": materials.fingerprint(name),
            }
            prompts, digest = frozen(
                folder / f"{name}-{length}.jsonl",
                made_from,
                partial(write_prompts, task, length, settings.samples, materials),
            )
            sets.append(
                PromptSet(
                    "ruler", name, length, task.new_tokens, task.scoring, "", asker.tokens(prompts), prompts, digest
                )
            )
    return sets
