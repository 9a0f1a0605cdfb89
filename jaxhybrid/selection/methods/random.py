"""A seeded draw without replacement."""

import numpy as np

from jaxhybrid.selection.choice import Choice, Given, Method, exactly


def choose(given: Given, count: int) -> Choice:
    draw = np.random.default_rng(given.settings.seed).choice(given.depth, count, replace=False)
    return exactly([int(layer) for layer in draw])


METHODS = {"random": Method(choose, drawn=True)}
