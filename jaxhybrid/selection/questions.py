"""Prompts with one answer each, as arrays, and how well a model answers them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.answers import NO_TOKEN, States, is_answer, read_answers, softmax_states
from jaxhybrid.evaluate.recall_prompts import ROUND_TO, RecallTask, recall_task
from jaxhybrid.model.transformer import Model

CHOOSING_SEED = 1  # of the recall probe's prompts for a choice; those of the evaluation have 0


@dataclass(frozen=True)
class Prompts:
    """P prompts of at most T tokens, Q answers of at most A tokens in each."""

    tokens: np.ndarray  # [P,T] int32, 0 after a prompt's end
    places: np.ndarray  # [P,Q] the last token before each answer
    answers: np.ndarray  # [P,Q,A], NO_TOKEN after an answer's end


@dataclass(frozen=True)
class Answered:
    """What a model made of prompts."""

    right: float  # share of the answers that greedy decoding gives whole
    likelihood: float  # mean log-probability of an answer, in nats

    def to_json(self) -> dict[str, float]:
        return {"accuracy": self.right, "likelihood": self.likelihood}


def prompts_of(vocabulary: Vocabulary, pairs: Sequence[tuple[str, str]], context: int, key: str) -> Prompts:
    """Texts, begun as every text is, and the answers that follow them.

    Raises:
        ConfigError: one is longer than `context`; calls the settings that made it `key`.
    """
    asked = [vocabulary.prompt(text) for text, _ in pairs]
    whole = [vocabulary.prompt(text + answer) for text, answer in pairs]
    longest = max(map(len, whole))
    if longest > context:
        raise ConfigError(
            f"{key}: prompts take {longest} tokens, the teacher has a context of {context}. Make them shorter."
        )
    return answers_after(asked, whole, context)


def answers_after(asked: Sequence[Sequence[int]], whole: Sequence[Sequence[int]], context: int) -> Prompts:
    """Prompts, and the same with their answers, `context` tokens at most.

    A tokenizer may join the end of a prompt with its answer; then the answer begins with that token.
    """
    starts = [_shared(before, after) for before, after in zip(asked, whole)]
    longest = max(map(len, whole))
    tokens = np.zeros((len(whole), min(-(-longest // ROUND_TO) * ROUND_TO, context)), np.int32)
    answers = np.full((len(whole), 1, max(len(ids) - start for ids, start in zip(whole, starts))), NO_TOKEN, np.int32)
    for number, (ids, start) in enumerate(zip(whole, starts)):
        tokens[number, : len(ids)] = ids
        answers[number, 0, : len(ids) - start] = ids[start:]
    return Prompts(tokens, np.array(starts)[:, None] - 1, answers)


def recall_prompts(vocabulary: Vocabulary, pairs: int, prompts: int, longest: int, key: str) -> RecallTask:
    """Prompts as those of the evaluation's recall probe, others than its own.

    Raises:
        ConfigError: one has more than `longest` tokens; calls the setting that gives `pairs` `key`.
    """
    task = recall_task(vocabulary, pairs, prompts=prompts, seed=CHOOSING_SEED)
    if (length := task.tokens.shape[1]) > longest:
        raise ConfigError(f"{key} {pairs}: prompts take {length} tokens of {longest} at most. Ask for fewer pairs.")
    return task


def answer(
    model: Model,
    prompts: Prompts | RecallTask,
    softmax: np.ndarray,
    *,
    rows: int,
    dtype: Any,
    states: States = softmax_states,
) -> Answered:
    """How well the model answers with the layers `softmax` [L] softmax, as `states` has it; `rows` prompts at once."""
    likelihood, greedy = read_answers(
        model, prompts.tokens, prompts.places, prompts.answers, rows=rows, dtype=dtype, softmax=softmax, states=states
    )
    return Answered(float(is_answer(greedy, prompts.answers).mean()), float(likelihood.mean()))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
