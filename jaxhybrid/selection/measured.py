"""A ranking by one measurement of every layer."""

from collections.abc import Callable, Sequence

from jaxhybrid.errors import ConfigError
from jaxhybrid.selection.choice import Choice, Given, ranked
from jaxhybrid.selection.masked import MaskedStudent, finite
from jaxhybrid.selection.rounds import Round, by_layer, from_layers

Measure = Callable[[MaskedStudent], Sequence[float]]


def rank(given: Given, count: int, measure: Measure, passes: int) -> Choice:
    """The `count` best layers by what `measure` gives for each, highest first.

    passes: how often it takes the text through a model.
    """
    found = measure_layers(given, measure, passes)
    return ranked(from_layers(found["scores"]), count, rounds=[found])


def measure_layers(given: Given, measure: Measure, passes: int) -> Round:
    """A round with the value of every layer that `measure` gives, in their order.

    passes: how often it takes the text through a model.

    Raises:
        ConfigError: there are not as many values as layers.
        DivergenceError: one is no number.
    """

    def compute() -> Round:
        student, name = given.student(), given.settings.method
        values = list(measure(student))
        if len(values) != given.depth:
            raise ConfigError(
                f"The method {name} measured {len(values)} values of {given.depth} layers; one each is due."
            )
        scores = by_layer(finite(value, f"measure of layer {layer} by {name}") for layer, value in enumerate(values))
        tokens = student.tokens()
        return {"action": "rank", "scores": scores, "tokens": tokens, "forward_tokens": passes * tokens}

    return given.log.round(compute)


def restored_kls(student: MaskedStudent) -> list[float]:
    """Minus the KL(teacher, student) of the aligned student in which one layer is softmax, untrained."""
    return [-student.kl([layer]) for layer in range(student.depth)]
