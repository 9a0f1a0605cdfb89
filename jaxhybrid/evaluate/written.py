"""Answers that models write, read by RULER's rules: how much is right, how deep, and what stands there instead.

Prompts run in full batches of one shape; each fills its row of the engine from the left. A prompt that does not fit is
an error: cut at its beginning it would lose what is asked for.
"""

import re
from collections.abc import Callable, Sequence
from itertools import batched
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.decoding.engine import Engine, Request, rounded
from jaxhybrid.decoding.generate import answered
from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.bootstrap import mean_interval, ratio_interval
from jaxhybrid.evaluate.prompts import Prompt, PromptSet
from jaxhybrid.evaluate.recall import LEAST_TEACHER
from jaxhybrid.model.transformer import Model

DEPTHS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))

Keep = Callable[[str, PromptSet, list[str], np.ndarray], None]  # model, set, its answers, their scores


def compare_written(
    models: dict[str, Model],
    sets: Sequence[PromptSet],
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    *,
    batch_tokens: int,
    dtype: Any = jnp.bfloat16,
    keep: Keep = lambda *_: None,
) -> list[dict[str, Any]]:
    """For each set what it is, what chance gives, and the figures of the models, by name, the teacher first.

    Where the teacher scores less than LEAST_TEACHER, `applies` is false and no student is measured.
    """
    results = []
    for given in sets:
        lengths = [len(tokens) for tokens in given.tokens]
        record: dict[str, Any] = {
            "suite": given.suite,
            "task": given.task,
            "length": given.length,
            "prompts": len(lengths),
            "prompt_tokens": round(float(np.mean(lengths)), 1),
            "hash": given.digest,
            "scoring": given.scoring,
            "chance": chance(given.prompts),
            "applies": True,
            "models": {},
        }
        for name, model in models.items():
            if record["applies"]:
                label = f"{given.label}, {name}"
                said = write_answers(
                    model, given, vocabulary, end_ids, batch_tokens=batch_tokens, dtype=dtype, label=label
                )
                figures, scores = written_figures(given, said, vocabulary)
                keep(name, given, said, scores)
                record["models"][name] = figures
                record["applies"] = record["models"]["teacher"]["score"]["share"] >= LEAST_TEACHER
        results.append(record)
    return results


def require_room(given: PromptSet, context: int) -> None:
    """Raises ConfigError where a prompt with its answer is longer than the model's context."""
    longest = max(range(len(given.tokens)), key=lambda number: len(given.tokens[number]))
    if (tokens := len(given.tokens[longest])) + given.new_tokens > context:
        raise ConfigError(
            f"evaluate.{given.suite}: prompt {longest} of {given.task} takes {tokens} tokens and its answer up to "
            f"{given.new_tokens}; the teacher has a context of {context}, and no prompt is cut. Leave it out of the "
            "source, or choose shorter ones."
        )


def write_answers(
    model: Model,
    given: PromptSet,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    *,
    batch_tokens: int,
    dtype: Any = jnp.bfloat16,
    label: str = "",
) -> list[str]:
    """The text that greedy decoding puts after each prompt, on the active mesh, in batches of about `batch_tokens`."""
    longest = max(len(tokens) for tokens in given.tokens) + given.new_tokens
    rows = min(max(batch_tokens // longest, 1), len(given.tokens))
    said = [""] * len(given.tokens)
    order = sorted(range(len(said)), key=lambda number: -len(given.tokens[number]))  # the largest shapes first
    engine = Engine(model, rounded(rows), dtype=dtype)
    with tqdm(total=len(said), desc=label, disable=not label, leave=False) as bar:
        for group in batched(order, rows):
            filled = [*group, *group[-1:] * (rows - len(group))]  # as many as in the others: one program
            asked = [Request(given.tokens[number], given.new_tokens, end_ids=tuple(end_ids)) for number in filled]
            written = answered(engine, dict(enumerate(asked)))
            for number, tokens in zip(group, written):
                text = vocabulary.encoder.decode(tokens, skip_special_tokens=True)
                said[number] = text.split(given.stop)[0] if given.stop else text
                bar.update()
    return said


def cleaned(said: str) -> str:
    """As RULER reads an answer: without white space round it, control characters as line ends."""
    return re.sub(r"[\x00-\x1f]", "\n", said.strip()).strip()


def found_in(said: str, wanted: str) -> bool:
    return wanted.lower() in cleaned(said).lower()


def named_in(said: str, word: str) -> bool:
    """Whether it stands there as a whole: 'able' does not in 'table', nor 'harbor' in 'quiet-harbor'."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said, re.IGNORECASE) is not None


def score(prompt: Prompt, said: str, scoring: str) -> float:
    """`all`: the share of the answers that is found in what is said; `part`: whether any is."""
    found = [found_in(said, answer) for answer in prompt.answers]
    return float(any(found)) if scoring == "part" else sum(found) / len(found)


def written_figures(given: PromptSet, said: Sequence[str], vocabulary: Vocabulary) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one model, each a share with its 95 % interval over prompts; and the score of each prompt [P].

    `score`: by the rule of the set; `first_token`: prompts whose answer begins as a right one does, in a numbered list
    or not; `another`: prompts that are not all right and name an answer to another question (where there are such);
    `depths`: of the answers in each fifth of the haystack, those that are found, a prompt counting once where its
    answers are alternatives.
    """
    prompts = given.prompts
    scores = np.array([score(prompt, text, given.scoring) for prompt, text in zip(prompts, said)])
    begins = np.array([_begins_right(prompt, text, vocabulary) for prompt, text in zip(prompts, said)], float)
    figures: dict[str, Any] = {"score": mean_interval(scores), "first_token": mean_interval(begins)}
    if any(prompt.others for prompt in prompts):
        pairs = zip(prompts, said, scores)
        wrong = [own < 1 and any(named_in(text, other) for other in prompt.others) for prompt, text, own in pairs]
        figures["another"] = mean_interval(np.array(wrong, float))
    if all(prompt.depths for prompt in prompts):
        figures["depths"] = _by_depth(given, said, scores)
    return figures, scores


def _begins_right(prompt: Prompt, said: str, vocabulary: Vocabulary) -> bool:
    """Whether what is said begins with the first token that says something of one of the answers."""
    said = cleaned(said)
    beginnings = said, re.sub(r"^\d{1,2}\. +", "", said)
    for answer in prompt.answers:
        pieces = vocabulary.encoder.encode(f" {answer}", add_special_tokens=False).offsets
        end = next(end for _, end in pieces if f" {answer}"[:end].strip())
        if any(text.startswith(f" {answer}"[:end].strip()) for text in beginnings):
            return True
    return False


def _by_depth(given: PromptSet, said: Sequence[str], scores: np.ndarray) -> list[dict[str, float]]:
    parts = []
    for first, end in DEPTHS:
        counted, found = np.zeros(len(said)), np.zeros(len(said))
        for number, (prompt, text) in enumerate(zip(given.prompts, said)):
            each = [(depth, found_in(text, answer)) for answer, depth in zip(prompt.answers, prompt.depths)]
            if given.scoring == "part":  # alternatives, which stand in the same place
                each = [(prompt.depths[0], scores[number])]
            for depth, right in each:
                if first <= depth < end or depth == end == 1.0:
                    counted[number] += 1
                    found[number] += right
        if counted.any():
            parts.append({"first": first, "end": end, "answers": int(counted.sum()), **ratio_interval(found, counted)})
    return parts


def chance(prompts: Sequence[Prompt]) -> float | None:
    """The score of naming, at random, as many of the values in a prompt as are asked for; None where there are no
    others than the right ones."""
    if not any(prompt.others for prompt in prompts):
        return None
    return float(np.mean([len(p.answers) / (len(p.answers) + len(p.others)) for p in prompts]))
