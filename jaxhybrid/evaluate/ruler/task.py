"""What a task of RULER is, and what it writes its prompts from."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhybrid.checksums import file_checksum
from jaxhybrid.data.packing import hash_seed
from jaxhybrid.data.sources import open_source
from jaxhybrid.errors import DataError
from jaxhybrid.evaluate.prompts import Asker, Prompt, Scoring
from jaxhybrid.evaluate.words import sentence
from jaxhybrid.settings.evaluate import RulerConfig

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's own


@dataclass(frozen=True)
class Task:
    """`write(given, size)` gives prompt `given.number` with a haystack of `size` parts, whatever a part is: the same
    question for every size, and more tokens for a larger one."""

    name: str
    write: Callable[["Given", int], Prompt]
    new_tokens: int
    scoring: Scoring = "all"
    least: int = 1  # the smallest size
    most: Callable[["Materials"], int] | None = None  # the largest; None: there is none


class Materials:
    """What prompts are made of beside random draws."""

    def __init__(self, settings: RulerConfig, asker: Asker):
        self.settings, self.asker = settings, asker
        self._kept: dict[str, Any] = {}
        self._prose: list[str] = []
        self._rng = random.Random(hash_seed(settings.seed, "essays"))

    def once[T](self, name: str, make: Callable[[], T]) -> T:
        """What `make` gave the first time."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    def sentences(self, count: int) -> list[str]:
        """The first `count` of the haystack of essays: those of the given text, over and over, or made-up ones."""
        if self.settings.essays:
            given = self.once("essays", self._read_essays)
            return (given * (count // len(given) + 1))[:count]
        while len(self._prose) < count:
            self._prose.append(sentence(self._rng))
        return self._prose[:count]

    def fingerprint(self, task: str) -> str:
        """Of the files behind a task's prompts."""
        setting = {"qa_1": "squad", "qa_2": "hotpotqa"}.get(task)
        if setting:
            return file_checksum(self._file(setting))
        return open_source(self.settings.essays).fingerprint if self.settings.essays else ""

    def json(self, setting: str) -> Any:
        """What is in the file that a setting of `evaluate.ruler` names."""
        file = self._file(setting)
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"evaluate.ruler.{setting}: {file} is not JSON ({error}). Download it again.") from error

    def _file(self, setting: str) -> Path:
        file = Path(getattr(self.settings, setting)).expanduser()
        if not file.is_file():
            raise DataError(f"evaluate.ruler.{setting}: there is no file {file}.")
        return file

    def _read_essays(self) -> list[str]:
        texts = open_source(self.settings.essays).documents()
        found = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
        if not found:
            raise DataError(f"evaluate.ruler.essays {list(self.settings.essays)} has no text.")
        return found


@dataclass(frozen=True)
class Given:
    """Which prompt is to be written."""

    task: str
    length: int  # tokens of prompt and answer together, at most
    number: int
    materials: Materials

    def rng(self, purpose: str) -> random.Random:
        """Always the same draws for this prompt and purpose, whatever the size of its haystack."""
        return random.Random(
            hash_seed(self.materials.settings.seed, f"{self.task} {self.length} {self.number} {purpose}")
        )

    @property
    def depth(self) -> float | None:
        """Where the needle that is asked for is to stand, from 0 to 1; None: drawn."""
        depths = self.materials.settings.depths
        return depths[self.number % len(depths)] / 100 if depths else None


def interleaved(parts: Sequence[str], inserted: Sequence[str], before: Sequence[int]) -> list[str]:
    """`parts` with each of `inserted` in front of the part of that number; `before` ascends."""
    found: list[str] = []
    last = 0
    for each, place in zip(inserted, before):
        found += [*parts[last:place], each]
        last = place
    return [*found, *parts[last:]]
