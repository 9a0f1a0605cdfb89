"""Each layer alone: minus the cosine of what goes into the teacher's block and what comes out of it."""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.measured import rank


def choose(given: Given, count: int) -> Choice:
    return rank(given, count, lambda student: [-value for value in student.block_cosines()], 2)


METHODS = {"cosine": Method(choose, "student")}
