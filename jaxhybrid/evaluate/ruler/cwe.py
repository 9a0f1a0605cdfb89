"""Common words: a numbered list in which ten words come up more often than all others."""

import random

from jaxhybrid.evaluate.prompts import Prompt
from jaxhybrid.evaluate.ruler.task import Given, Task
from jaxhybrid.evaluate.words import ADJECTIVES, NOUNS, VERBS, distinct, shuffled, word_pair

COMMON = 10
SHORT = 4096  # below it words are repeated less often, as in RULER
WORDS = tuple(sorted({*NOUNS, *ADJECTIVES, *VERBS}))


def _list(rng: random.Random, size: int, often: int, seldom: int) -> tuple[str, list[str], list[str]]:
    """The numbered list of `size` different words, the common ones, the others."""
    words = shuffled(rng, WORDS)[:size]
    # Beyond the words at hand, pairs of them.
    words += distinct(rng, max(size - len(words), 0), word_pair)
    common, others = words[:COMMON], words[COMMON:]
    listed = shuffled(rng, [*common * often, *others * seldom])
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), common, others


def _asked(listed: str) -> tuple[str, str]:
    # The wording is RULER's (Apache-2.0): figures depend on it.
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{listed}\nQuestion: What are the 10 most common words in the above list?"
    )
    return text, " Answer: The top 10 words that appear most often in the list are:"


def _write(given: Given, size: int) -> Prompt:
    short = given.length < SHORT
    listed, common, _ = _list(given.rng("example"), *((20, 3, 1) if short else (40, 10, 3)))
    solved = "".join(_asked(listed)) + " " + " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
    listed, common, others = _list(given.rng("list"), size, *((6, 1) if short else (30, 3)))
    text, prefix = _asked(listed)
    return Prompt(f"{solved}\n{text}", prefix, tuple(common), tuple(others))


TASKS = (Task("cwe", _write, new_tokens=120, least=COMMON + 1),)
