"""Evenly spaced layers."""

import numpy as np

from jaxhybrid.selection.choice import Choice, Given, Method, exactly


def choose(given: Given, count: int) -> Choice:
    """The last layer of each of `count` groups, or the first.

    Both are published: 3, 7, ..., 27 is the list for Llama-3.2-3B (7 of 28 layers), and for Qwen2.5-3B it is every
    fourth from 0, or every eighth (0, 8, ..., 32 for 5 of 36). Where so wide a step leaves no room for the last ones,
    the first layers of groups as equal as can be are taken.
    """
    depth = given.depth
    if given.settings.uniform == "last":
        return exactly([int(np.floor((i + 1) * depth / count + 0.5)) - 1 for i in range(count)])
    step = -(-depth // count)
    if (count - 1) * step < depth:
        return exactly(range(0, count * step, step))
    return exactly([i * depth // count for i in range(count)])


METHODS = {"uniform": Method(choose)}
