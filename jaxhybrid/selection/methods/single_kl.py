"""Each layer alone: minus the KL(teacher, student) of the aligned student in which that layer is softmax, untrained."""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.measured import rank


def choose(given: Given, count: int) -> Choice:
    return rank(given, count, lambda student: [-student.kl([layer]) for layer in range(given.depth)], given.depth + 1)


METHODS = {"single_kl": Method(choose, "student", answers=True)}
