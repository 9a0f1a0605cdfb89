"""Prompts whose answers a model writes: what one is, its tokens, and the file in which a set of them is frozen."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError
from jaxhybrid.files import write_text

Scoring = Literal["all", "part"]  # of the answers: the share that is found, or whether any is


@dataclass(frozen=True)
class Prompt:
    """One question."""

    text: str
    prefix: str  # how the answer begins; in a chat it stands behind the assistant's header
    answers: tuple[str, ...]
    others: tuple[str, ...] = ()  # what stands in the text and would be an answer to another question
    depths: tuple[float, ...] = ()  # of each answer: the share of the haystack before it; () where there is no such


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one task."""

    suite: str  # ruler or completion
    task: str
    length: int | None  # tokens of prompt and answer together at most; None: as long as they are
    new_tokens: int  # of an answer, at most
    scoring: Scoring
    stop: str  # what ends an answer beside the model's end tokens; "": nothing
    tokens: list[list[int]]
    prompts: list[Prompt]
    digest: str  # of the prompts

    @property
    def label(self) -> str:
        return self.task if self.length is None else f"{self.task} {self.length:,}"

    @property
    def file_name(self) -> str:
        return self.task if self.length is None else f"{self.task}-{self.length}"


@dataclass(frozen=True)
class Asker:
    """Turns prompts into tokens: through the chat template, or begun as every text is."""

    vocabulary: Vocabulary
    chat: bool

    @staticmethod
    def of(vocabulary: Vocabulary, chat: bool | None, setting: str) -> "Asker":
        """`chat` None: the template if the tokenizer has one. Raises ConfigError where it is wanted and missing."""
        template = getattr(vocabulary.tokenizer, "chat_template", None)
        if chat and not template:
            raise ConfigError(f"{setting} is true, but the tokenizer of {vocabulary.name!r} has no chat template.")
        return Asker(vocabulary, bool(template) if chat is None else chat)

    def tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        texts = [(self._asked(prompt.text) if self.chat else prompt.text) + prompt.prefix for prompt in prompts]
        return self.vocabulary.prompts(texts, begin=not self.chat)  # a template writes its own beginning

    @property
    def fingerprint(self) -> str:
        """Changes when any prompt might have other tokens."""
        return f"{self.vocabulary.fingerprint} {self._asked('') if self.chat else ''}"

    def _asked(self, text: str) -> str:
        turns = [{"role": "user", "content": text}]
        asked: str = self.vocabulary.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return asked


def frozen(path: Path, made_from: dict[str, Any], make: Callable[[], list[Prompt]]) -> tuple[list[Prompt], str]:
    """The prompts in the file `path` and their hash. Where it has none, or others than of `made_from`, they are made.

    The first line says what they were made from and their hash, each further line is a prompt. A damaged file is
    warned of and made again.
    """
    if path.exists():
        try:
            head, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            said = json.loads(head)
            if said["made_from"] == made_from:
                if said["hash"] == _digest(lines):
                    return [_prompt(json.loads(line)) for line in lines], said["hash"]
                warnings.warn(f"{path} does not match its hash: it is damaged, and made again.", stacklevel=2)
        except (ValueError, KeyError, TypeError):
            warnings.warn(f"{path} is not readable as prompts: it is damaged, and made again.", stacklevel=2)
    prompts = make()
    lines = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in prompts]
    digest = _digest(lines)
    head = json.dumps({"made_from": made_from, "hash": digest})
    write_text(path, "\n".join([head, *lines]) + "\n")
    return prompts, digest


def _digest(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=12).hexdigest()


def _prompt(line: dict[str, Any]) -> Prompt:
    return Prompt(line["text"], line["prefix"], *(tuple(line[name]) for name in ("answers", "others", "depths")))
