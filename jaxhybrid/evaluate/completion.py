"""Texts that stop before a value that stands in them: FDA, SWDE and SQuAD as in arXiv 2402.18668, or files like them.

What a model writes to the end of the line is right when it holds the value. The prompt is the bare text, as in
lm-evaluation-harness's tasks of these names: no chat template.
"""

import glob
import os
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from jaxhybrid.data.sources import HUB
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate.prompts import Asker, Prompt, PromptSet, frozen
from jaxhybrid.settings.evaluate import CompletionConfig

LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
Rows = Iterable[dict[str, Any]]
FORM = 1  # raised when the same settings would give other prompts


def completion_prompts(settings: CompletionConfig, asker: Asker, folder: Path) -> list[PromptSet]:
    """One set for each source, named after it and frozen in a file of `folder`.

    Raises:
        ConfigError: two sources have the same name.
        DataError: a source cannot be read, lacks a field, or has a row without text or value.
    """
    sets: list[PromptSet] = []
    for source in settings.sources:
        name = source_name(source)
        if any(name == found.task for found in sets):
            raise ConfigError(f"evaluate.completion.sources: two are called {name!r}, the last {source!r}; rename one.")
        made_from = {"form": FORM, "source": source, "samples": settings.samples, "changed": _state(source)}
        made_from |= {"fields": [settings.text_field, settings.answer_field], "tokens": asker.fingerprint}
        prompts, digest = frozen(folder / f"{name}.jsonl", made_from, partial(_read, source, settings))
        tokens = asker.tokens(prompts)
        sets.append(PromptSet("completion", name, None, settings.new_tokens, "all", "\n", tokens, prompts, digest))
    return sets


def source_name(source: str) -> str:
    """'hub:hazyresearch/based-fda::validation' -> 'based-fda', 'data/fda.jsonl' -> 'fda'."""
    if source.startswith(HUB):
        return source.removeprefix(HUB).split(":")[0].rpartition("/")[2]
    return Path(source).name.split(".")[0]


def _state(source: str) -> list[Any]:
    """Changes when a local file may have changed."""
    files = [] if source.startswith(HUB) else sorted(glob.glob(os.path.expanduser(source)))
    return [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]


def _read(source: str, settings: CompletionConfig) -> list[Prompt]:
    prompts = []
    for number, row in enumerate(islice(_rows(source), settings.samples)):
        found = []
        for field in (settings.text_field, settings.answer_field):
            value = row.get(field)
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    f"{source} row {number}: {field!r} is {value!r:.60}, not text; it has {sorted(row)}. Set "
                    "evaluate.completion.text_field and answer_field."
                )
            found.append(value.strip())
        prompts.append(Prompt(found[0], "", (found[1],)))
    if not prompts:
        raise DataError(f"{source} has no rows.")
    return prompts


def _rows(source: str) -> Rows:
    from datasets import load_dataset

    try:
        if source.startswith(HUB):
            name, config, split = ([*source.removeprefix(HUB).split(":"), "", ""])[:3]
            return cast(Rows, load_dataset(name, config or None, split=split or "validation"))
        loader = LOADERS.get(Path(source).suffix)
        if loader is None:
            raise DataError(f"{source} is of no known kind; known: hub:ID and {', '.join(LOADERS)}.")
        return cast(Rows, load_dataset(loader, data_files=os.path.expanduser(source), split="train"))
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, unknown config or split, damaged
        raise DataError(f"Cannot read {source!r}: {error}") from error
