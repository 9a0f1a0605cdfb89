"""Variable tracking: five variables get the same value, each from the one before, and all five are asked for."""

import string
from itertools import pairwise

from jaxhybrid.evaluate.prompts import Prompt
from jaxhybrid.evaluate.ruler.fit import largest
from jaxhybrid.evaluate.ruler.task import NOISE, Given, Task, interleaved
from jaxhybrid.evaluate.words import between, distinct, letters, places

HOPS = 4
EXAMPLE_TOKENS = 500  # of the solved example, at most


def _asked(given: Given, purpose: str, size: int, letters_each: int) -> tuple[str, str, list[str], list[float]]:
    """Question, beginning of the answer, the variables in order, and how deep each one's assignment stands."""
    rng = given.rng(purpose)
    names = distinct(rng, HOPS + 1, lambda rng: letters(rng, letters_each, string.ascii_uppercase))
    value = between(rng, 10_000, 99_999)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]
    before = places(rng, len(chain), size)
    context = "\n".join(interleaved([NOISE] * size, chain, before))
    # The wording is RULER's (Apache-2.0): figures depend on it.
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
        f"assigned the value {value}, they are: "
    )
    return text, prefix, names, [place / size for place in before]


def _write(given: Given, size: int) -> Prompt:
    def example(size: int) -> str:
        text, prefix, names, _ = _asked(given, "example", size, letters_each=3)
        return f"{text}{prefix} {' '.join(names)}\n"

    def fitted() -> int:
        prompt = given.materials.asker.vocabulary.prompt
        return largest(lambda size: len(prompt(example(size))) <= EXAMPLE_TOKENS, HOPS + 1) or HOPS + 1

    text, prefix, names, depths = _asked(given, "chain", size, letters_each=5)
    solved = example(given.materials.once(f"size of the example of {given.length}", fitted))
    return Prompt(f"{solved}\n{text}", prefix, tuple(names), depths=tuple(depths))


TASKS = (Task("vt", _write, new_tokens=30, least=HOPS + 1),)
