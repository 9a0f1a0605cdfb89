"""How much haystack fits: as much as a length allows, counted in the tokens of the model at hand."""

import math
from collections.abc import Callable, Sequence

from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.prompts import Prompt
from jaxhybrid.evaluate.ruler.task import Given, Materials, Task


def largest(fits: Callable[[int], bool], least: int, most: int | None = None) -> int | None:
    """The largest size from `least` to `most` that fits, by doubling and halving; None when `least` does not."""
    if not fits(least):
        return None
    low, high = least, 2 * least
    while (most is None or high <= most) and fits(high):
        low, high = high, 2 * high
    high = high if most is None else min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def write_prompts(task: Task, length: int, samples: int, materials: Materials) -> list[Prompt]:
    """`samples` prompts that leave room for the answer in `length` tokens, and hardly any for another part of haystack.

    Raises:
        ConfigError: not even the smallest prompt fits.
    """
    asker, room = materials.asker, length - task.new_tokens
    most = task.most(materials) if task.most else None

    def write(number: int, size: int) -> Prompt:
        return task.write(Given(task.name, length, number, materials), size)

    def count(prompts: Sequence[Prompt]) -> list[int]:
        return [len(tokens) for tokens in asker.tokens(prompts)]

    def too_long(tokens: int) -> ConfigError:
        return ConfigError(
            f"evaluate.ruler.lengths has {length}: the shortest prompt of {task.name} takes {tokens} tokens, and its "
            f"answer up to {task.new_tokens} more. Ask for {tokens + task.new_tokens} or more, or leave the task out."
        )

    first = largest(lambda size: count([write(0, size)])[0] <= room, task.least, most)
    smallest = count([write(0, task.least)])[0]
    if first is None:
        raise too_long(smallest)
    sizes, prompts = [first] * samples, [write(number, first) for number in range(samples)]
    tokens = count(prompts)

    def parts(number: int, more: int) -> float:
        """How many parts of this prompt's haystack take so many tokens."""
        return more * max(sizes[number] - task.least, 1) / max(tokens[number] - smallest, 1)

    def resize(changed: list[int]) -> None:
        for number in changed:
            prompts[number] = write(number, sizes[number])
        for number, found in zip(changed, count([prompts[number] for number in changed])):
            tokens[number] = found

    for _ in range(2):  # where the first prompt's size leaves room
        grown = [size + max(int(parts(number, room - tokens[number])), 0) for number, size in enumerate(sizes)]
        grown = grown if most is None else [min(size, most) for size in grown]
        changed = [number for number in range(samples) if grown[number] > sizes[number]]
        sizes = grown
        resize(changed)
    while over := [number for number in range(samples) if tokens[number] > room]:
        for number in over:
            if sizes[number] == task.least:
                raise too_long(tokens[number])
            less = max(math.ceil(parts(number, tokens[number] - room)), 1)
            sizes[number] = max(sizes[number] - less, task.least)
        resize(over)
    return prompts
