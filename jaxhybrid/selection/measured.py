"""A ranking by one measurement of every layer."""

from collections.abc import Callable, Sequence

from jaxhybrid.selection.choice import Choice, Given, ranked
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.rounds import Round


def rank(given: Given, count: int, measure: Callable[[MaskedStudent], Sequence[float]], passes: int) -> Choice:
    """The `count` best layers by what `measure` gives for each, highest first.

    passes: how often it takes the text through a model.
    """

    def compute() -> Round:
        student = given.student()
        scores = {str(layer): float(value) for layer, value in enumerate(measure(student))}
        tokens = student.tokens()
        return {"action": "rank", "scores": scores, "tokens": tokens, "forward_tokens": passes * tokens}

    found = given.log.round(compute)
    return ranked({int(layer): value for layer, value in found["scores"].items()}, count, rounds=[found])
