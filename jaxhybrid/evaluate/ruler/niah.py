"""Needles in a haystack: sentences that give a key its value, in a text that is about something else.

The eight tasks differ in the haystack (repeated noise, essays, or needles of other keys), in what keys and values are,
and in how many there are.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxhybrid.evaluate.prompts import Prompt
from jaxhybrid.evaluate.ruler.task import NOISE, Given, Task, interleaved
from jaxhybrid.evaluate.words import distinct, number, places, shuffled, uuid4, word_pair

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["words", "numbers", "uuids"]

# Depths in percent at which needles stand among essays, as in RULER: 40 of them, evenly spread.
DEPTHS = [round(100 * step / 39) for step in range(40)]
DRAWS: dict[Kind, Callable[[random.Random], str]] = {
    "words": word_pair,
    "numbers": partial(number, digits=7),
    "uuids": uuid4,
}


def _write(
    given: Given, size: int, *, haystack: Haystack, key: Kind, value: Kind, keys: int, values: int, queries: int
) -> Prompt:
    rng = given.rng("needles")
    # Keys of distractors come after the needles' own, so that the question is the same for every size.
    names = distinct(rng, keys, DRAWS[key])
    numbers = distinct(rng, keys * values, DRAWS[value])
    asked = shuffled(rng, range(keys))[:queries]
    needles = [(k, numbers[k * values + v]) for k in range(keys) for v in range(values)]

    def sentence(name: str, number: str) -> str:
        return f"One of the special magic {value} for {name} is: {number}."

    distractors: list[str] = []
    if haystack == "needle":
        own, others = given.rng("distractor keys"), given.rng("distractor values")
        fresh = [name for name in distinct(own, size + keys, DRAWS[key]) if name not in names][:size]
        distractors = [n for n in distinct(others, size + len(numbers), DRAWS[value]) if n not in numbers][:size]
        parts = [sentence(*pair) for pair in zip(fresh, distractors)]
    else:
        parts = given.materials.sentences(size) if haystack == "essay" else [NOISE] * size

    order = shuffled(rng, range(len(needles)))
    if haystack == "essay":
        percents = sorted(DEPTHS[place] for place in places(rng, len(needles), len(DEPTHS)))
        before = [int(size * percent / 100) for percent in percents]
    else:
        before = places(rng, len(needles), size)
    if given.depth is not None:  # the first needle that is asked for goes there
        first = order.index(asked[0] * values)
        rest, stands = [n for i, n in enumerate(order) if i != first], int(size * given.depth)
        others_before = before[:first] + before[first + 1 :]
        spot = sum(place < stands for place in others_before)
        order = [*rest[:spot], order[first], *rest[spot:]]
        before = sorted([*others_before, stands])
    context = interleaved(parts, [sentence(names[needles[n][0]], needles[n][1]) for n in order], before)

    wanted = [n for k in asked for n in range(k * values, (k + 1) * values)]
    answers = tuple(needles[n][1] for n in wanted)
    queried = [names[k] for k in asked]
    question = {"query": ", ".join(queried[:-1]) + f", and {queried[-1]}" if len(queried) > 1 else queried[0]}
    single = len(answers) == 1
    magic = value.removesuffix("s") if single else value
    opening = f"A special magic {magic} is hidden" if single else f"Some special magic {magic} are hidden"
    ask = f"What is the special magic {magic}" if single else f"What are all the special magic {magic}"
    # The wording is RULER's (Apache-2.0): figures depend on it.
    text = (
        f"{opening} within the following text. Make sure to memorize it. I will quiz you about the {magic} afterwards."
        f"\n{(' ' if haystack == 'essay' else chr(10)).join(context)}\n"
        f"{ask} for {question['query']} mentioned in the provided text?"
    )
    prefix = (
        f" The special magic {magic} for {question['query']} mentioned in the provided text {'is' if single else 'are'}"
    )
    return Prompt(
        text,
        prefix,
        answers,
        (*(number for _, number in needles if number not in answers), *distractors),
        tuple(before[order.index(n)] / size for n in wanted),
    )


def _task(
    name: str,
    haystack: Haystack,
    key: Kind = "words",
    value: Kind = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Task:
    shape = {"key": key, "value": value, "keys": keys, "values": values, "queries": queries}
    write = partial(_write, haystack=haystack, **shape)  # type: ignore[arg-type]
    return Task(name, write, new_tokens=128, least=keys * values)


TASKS = (
    _task("niah_single_1", "noise"),
    _task("niah_single_2", "essay"),
    _task("niah_single_3", "essay", value="uuids"),
    _task("niah_multikey_1", "essay", keys=4),
    _task("niah_multikey_2", "needle"),
    _task("niah_multikey_3", "needle", key="uuids", value="uuids"),
    _task("niah_multivalue", "essay", values=4),
    _task("niah_multiquery", "essay", keys=4, queries=4),
)
