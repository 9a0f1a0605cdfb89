"""Frequent words: made-up words whose counts fall with their rank k as k^-2 (a zeta distribution); the three most
frequent are asked for, the very first of all being dots."""

import math
import string

from jaxhybrid.evaluate.prompts import Prompt
from jaxhybrid.evaluate.ruler.task import Given, Task
from jaxhybrid.evaluate.words import distinct, letters, shuffled

NEW_TOKENS = 50
DOTS = "..."
ZETA = math.pi**2 / 6  # of 2


def _write(given: Given, size: int) -> Prompt:
    """`size`: words before the counts are rounded down."""
    rng = given.rng("words")
    kinds = max((given.length - NEW_TOKENS) // 50, 4)
    words = distinct(rng, kinds, lambda rng: letters(rng, 6, string.ascii_lowercase))
    words[0] = DOTS
    repeated = [word for rank, word in enumerate(words, 1) for _ in range(int(size / (rank * rank * ZETA)))]
    context = " ".join(shuffled(given.rng("order"), repeated))
    # The wording is RULER's (Apache-2.0): figures depend on it.
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    others = tuple(word for word in dict.fromkeys(repeated) if word not in words[:4])
    return Prompt(text, prefix, tuple(words[1:4]), others)


TASKS = (Task("fwe", _write, new_tokens=NEW_TOKENS, least=100),)  # from here on the counts of ranks 2 to 5 differ
