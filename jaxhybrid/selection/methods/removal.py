"""From the all-softmax model, the layer whose loss raises KL(teacher, student) least becomes linear, and again."""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.greedy import Search, SearchConfig


class RemovalConfig(SearchConfig):
    """Greedy removal on true KL: from the all-softmax model, the layer whose loss costs least becomes linear."""


def choose(given: Given, count: int) -> Choice:
    depth = given.depth
    search = Search(given, given.own(RemovalConfig), frozenset(range(depth)), depth - count)
    dropped: list[int] = []
    while len(search.kept) > count:
        dropped.append(search.step("drop", {layer: search.kept - {layer} for layer in sorted(search.kept)}))
    kept = tuple(sorted(search.kept))
    nested = range(count, depth + 1 if search.alike else count + 1)
    return Choice(kept, (*kept, *reversed(dropped)), nested, rounds=search.rounds)


METHODS = {"removal": Method(choose, "student", RemovalConfig, answers=True)}
