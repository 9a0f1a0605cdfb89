"""A ranking by one measurement of every layer."""

from collections.abc import Callable, Sequence

from jaxhybrid.selection.choice import Choice, Given, ranked
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.rounds import Round, by_layer, from_layers

Measure = Callable[[MaskedStudent], Sequence[float]]


def rank(given: Given, count: int, measure: Measure, passes: int) -> Choice:
    """The `count` best layers by what `measure` gives for each, highest first.

    passes: how often it takes the text through a model.
    """
    found = measure_layers(given, measure, passes)
    return ranked(from_layers(found["scores"]), count, rounds=[found])


def measure_layers(given: Given, measure: Measure, passes: int) -> Round:
    def compute() -> Round:
        student = given.student()
        scores, tokens = by_layer(measure(student)), student.tokens()
        return {"action": "rank", "scores": scores, "tokens": tokens, "forward_tokens": passes * tokens}

    return given.log.round(compute)


def restored_kls(student: MaskedStudent) -> list[float]:
    """Minus the KL(teacher, student) of the aligned student in which one layer is softmax, untrained."""
    return [-student.kl([layer]) for layer in range(student.depth)]
