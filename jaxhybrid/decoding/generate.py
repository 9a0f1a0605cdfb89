"""Answers to prompts, all at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxhybrid.decoding.engine import Engine, Request, check_request, rounded
from jaxhybrid.decoding.sampling import Sampling
from jaxhybrid.model.transformer import Model


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> list[list[int]]:
    """New tokens for each prompt, up to and including an end token.

    The result is that of each prompt alone: prompt i draws as it would by itself with `seed + i`. Temperature 0 is
    greedy; `Sampling` says what the other settings are. With a mesh active the prompts are split over its devices.

    Raises:
        DataError: a prompt is empty, or holds a token outside the vocabulary.
        ConfigError: a setting is out of range.
    """
    choice = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    requests = {
        number: Request(prompt, max_new_tokens, seeded(choice, number), tuple(eos_ids))
        for number, prompt in enumerate(prompts)
    }
    for number, request in requests.items():  # before the weights are laid out
        check_request(request, number, model.config)
    if not requests:
        return []
    return answered(Engine(model, rounded(len(requests)), dtype=dtype), requests)


def answered(engine: Engine, requests: Mapping[int, Request]) -> list[list[int]]:
    """New tokens for each of `requests`, which are of idle slots, the engine having no others."""
    engine.prefill(requests)
    answers: dict[int, list[int]] = {number: [] for number in requests}
    while engine.busy:
        for number, tokens in engine.step().items():
            answers[number] += tokens
    return list(answers.values())


def seeded(choice: Sampling, number: int) -> Sampling:
    """The settings of prompt `number` of several."""
    return Sampling(**{**vars(choice), "seed": (choice.seed + number) % 2**32})
