"""Each layer alone: how far its aligned mixer's output is from its attention's, both for the teacher's input."""

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.measured import rank


def choose(given: Given, count: int) -> Choice:
    return rank(given, count, MaskedStudent.activation_errors, 2)


METHODS = {"activation_mse": Method(choose, "student")}
