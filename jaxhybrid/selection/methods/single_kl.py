"""Each layer alone: minus the KL(teacher, student) of the aligned student in which that layer is softmax, untrained."""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.measured import rank, restored_kls


def choose(given: Given, count: int) -> Choice:
    return rank(given, count, restored_kls, given.depth + 1)


METHODS = {"single_kl": Method(choose, "student", answers=True)}
