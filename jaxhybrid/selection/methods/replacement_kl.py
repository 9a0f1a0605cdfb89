"""Each layer alone: the KL to the teacher when its aligned mixer replaces its attention in the teacher, untrained.

Removal scored once, as single_kl is addition scored once; Puzzle's replace-1-block score (arXiv 2411.19146).
"""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.measured import rank


def choose(given: Given, count: int) -> Choice:
    layers = frozenset(range(given.depth))

    def kls(student: MaskedStudent) -> list[float]:
        return [student.kl(layers - {layer}) for layer in sorted(layers)]

    return rank(given, count, kls, given.depth + 1)


METHODS = {"replacement_kl": Method(choose, "student", answers=True)}
