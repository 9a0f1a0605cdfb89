"""From the all-softmax model, the layer whose loss raises KL(teacher, student) least becomes linear, and again."""

from jaxhybrid.selection.choice import Choice, Given
from jaxhybrid.selection.greedy import Search


def choose(given: Given, count: int) -> Choice:
    depth = given.depth
    search = Search(given, given.settings.removal, frozenset(range(depth)), depth - count)
    dropped: list[int] = []
    while len(search.kept) > count:
        dropped.append(search.step("drop", {layer: search.kept - {layer} for layer in sorted(search.kept)}))
    kept = tuple(sorted(search.kept))
    return Choice(kept, (*kept, *reversed(dropped)), range(count, depth + 1), rounds=search.rounds)
