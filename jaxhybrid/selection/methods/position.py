"""Layers by their place alone: the first, the middle or the last ones, side by side."""

from jaxhybrid.selection.choice import Choice, Given, Method, exactly


def first(given: Given, count: int) -> Choice:
    return exactly(range(count))


def middle(given: Given, count: int) -> Choice:
    start = (given.depth - count) // 2
    return exactly(range(start, start + count))


def last(given: Given, count: int) -> Choice:
    return exactly(range(given.depth - count, given.depth))


METHODS = {"first": Method(first), "middle": Method(middle), "last": Method(last)}
