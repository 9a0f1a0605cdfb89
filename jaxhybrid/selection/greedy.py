"""Greedy search over sets of softmax layers by true KL: the round that all of its forms consist of."""

from collections.abc import Callable

from jaxhybrid import hosts
from jaxhybrid.selection.choice import Given
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.rounds import Round
from jaxhybrid.settings.select import MeasureConfig, MethodConfig
from jaxhybrid.settings.types import Count, about

Kept = frozenset[int]


class SearchConfig(MethodConfig):
    """How sets of a round are compared."""

    first_tokens: Count | None = about(
        None, "tokens of select.measure that the first round compares sets on, growing to all in the last; null: all"
    )
    rescore: Count = about(3, "the closest sets of a round on fewer tokens, compared again on all")

    def trouble(self, measure: MeasureConfig) -> str | None:
        if self.first_tokens is None or self.first_tokens <= measure.tokens:
            return None
        return f"first_tokens {self.first_tokens:,} are more than the {measure.tokens:,} of measure.tokens"


class Search:
    """A set that gets better, or less bad, by the best of the options of every round."""

    def __init__(self, given: Given, settings: SearchConfig, kept: Kept, rounds: int):
        self._given, self._settings, self._expected = given, settings, rounds
        self.rounds: list[Round] = []

        def compute() -> Round:
            student = given.student()
            kl, tokens = student.kl(kept), student.tokens()
            return _round("start", None, kept, kl, tokens, {}, 2 * tokens)  # the teacher's pass and the set's

        self._take(compute)

    @property
    def kept(self) -> Kept:
        return frozenset(self.rounds[-1]["kept"])

    @property
    def kl(self) -> float:
        """Of the set, on all tokens."""
        return self.rounds[-1]["kl"]

    @property
    def alike(self) -> bool:
        """Whether the rounds are those of a search for any number of layers: else their tokens depend on it."""
        return self._settings.first_tokens is None

    def step(self, action: str, options: dict[int, Kept]) -> int:
        """Takes the option, by layer, whose set has the lowest KL; ties go to the lower layer."""
        few = self._batches(len(self.rounds) - 1)

        def compute() -> Round:
            student = self._given.student()
            scores, best, tokens = self._compare(student, options, few)
            layer = _lowest(best)[0]
            found = _round(action, layer, options[layer], best[layer], student.tokens(few), scores, tokens)
            return found if few == student.batches else found | {"rescored": _by_name(best)}

        return self._take(compute)["layer"]

    def swap(self, out: int, options: dict[int, Kept]) -> int | None:
        """Takes the best option in place of the set, if its KL is lower. Each option has not `out`, but its layer."""
        kept, kl, few = self.kept, self.kl, self._batches(self._expected)

        def compute() -> Round:
            student = self._given.student()
            scores, best, tokens = self._compare(student, options, few)
            layer = _lowest(best)[0]
            measured = student.tokens(few), scores, tokens
            if best[layer] < kl:
                return _round("swap", layer, options[layer], best[layer], *measured) | {"out": out}
            return _round("swap", None, kept, kl, *measured) | {"out": out}

        return self._take(compute)["layer"]

    def _take(self, compute: Callable[[], Round]) -> Round:
        self.rounds.append(self._given.log.round(compute))
        return self.rounds[-1]

    def _compare(
        self, student: MaskedStudent, options: dict[int, Kept], few: int
    ) -> tuple[dict[int, float], dict[int, float], int]:
        """(KL of every option on `few` batches, of the closest ones on all, tokens that took)."""
        kls = [student.kl(kept, few) for kept in options.values()]
        # What is measured next must be the same on all processes.
        scores = dict(zip(options, hosts.broadcast(kls, "scores of a round")))
        closest = _lowest(scores)[: self._settings.rescore]
        best = {layer: student.kl(options[layer]) for layer in closest}
        more = student.tokens() - student.tokens(few)
        return scores, best, len(options) * student.tokens(few) + len(best) * more

    def _batches(self, number: int) -> int:
        """Of round `number`: from the first one's to all of them in the last, by equal factors."""
        measure, first = self._given.settings.measure, self._settings.first_tokens
        if first is None or number + 1 >= self._expected:
            return measure.batches
        least = measure.batches_of(first)
        return round(least * (measure.batches / least) ** (number / (self._expected - 1)))


def _round(
    action: str, layer: int | None, kept: Kept, kl: float, tokens: int, scores: dict[int, float], forward_tokens: int
) -> Round:
    return {
        "action": action,
        "layer": layer,
        "kept": sorted(kept),
        "kl": kl,
        "tokens": tokens,
        "scores": _by_name(scores),
        "forward_tokens": forward_tokens,
    }


def _by_name(scores: dict[int, float]) -> dict[str, float]:
    return {str(layer): value for layer, value in scores.items()}


def _lowest(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda layer: (scores[layer], layer))
