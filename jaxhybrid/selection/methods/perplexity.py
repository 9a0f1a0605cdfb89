"""Each layer alone: the rise of the teacher's cross entropy when its aligned mixer replaces its attention."""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.measured import rank


def choose(given: Given, count: int) -> Choice:
    layers = frozenset(range(given.depth))

    def rises(student: MaskedStudent) -> list[float]:
        whole = student.cross_entropy(layers)
        return [student.cross_entropy(layers - {layer}) - whole for layer in sorted(layers)]

    return rank(given, count, rises, given.depth + 2)


METHODS = {"perplexity": Method(choose, "student", answers=True)}
