"""Greedy search over sets of softmax layers by true KL: the round that all of its forms consist of."""

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

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
    lazy: Annotated[float, Field(ge=1)] | None = about(
        None,
        "leave out of a round the layers that cannot win it if what a layer brings has grown to at most so many times "
        "what it brought when last measured: 1 if it never grows; null: measure all",
    )

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
            return round_of("start", None, kept, kl, tokens, {}, 2 * tokens)  # the teacher's pass and the set's

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
        kept, few = self.kept, self._batches(len(self.rounds) - 1)

        def compute() -> Round:
            student = self._given.student()
            before = student.kl(kept, few)  # known from the round before
            scores, best, tokens = self._compare(student, options, few, before)
            layer = lowest(best)[0]
            found = round_of(action, layer, options[layer], best[layer], student.tokens(few), scores, tokens)
            found["before"] = before
            return found if few == student.batches else found | {"rescored": _by_name(best)}

        return self._take(compute)["layer"]

    def swap(self, out: int, options: dict[int, Kept]) -> int | None:
        """Takes the best option in place of the set, if its KL is lower. Each option has not `out`, but its layer."""
        kept, kl, few = self.kept, self.kl, self._batches(self._expected)

        def compute() -> Round:
            student = self._given.student()
            scores, best, tokens = self._compare(student, options, few)
            layer = lowest(best)[0]
            measured = student.tokens(few), scores, tokens
            if best[layer] < kl:
                return round_of("swap", layer, options[layer], best[layer], *measured) | {"out": out}
            return round_of("swap", None, kept, kl, *measured) | {"out": out}

        return self._take(compute)["layer"]

    def _take(self, compute: Callable[[], Round]) -> Round:
        self.rounds.append(self._given.log.round(compute))
        return self.rounds[-1]

    def _compare(
        self, student: MaskedStudent, options: dict[int, Kept], few: int, before: float | None = None
    ) -> tuple[dict[int, float], dict[int, float], int]:
        """(KL of options on `few` batches, of the closest ones on all, tokens that took).

        before: KL of the set that they begin from on `few` batches; with it, and `lazy`, only those that may be among
        the closest are measured. The first that may not ends it: they come by the least KL that they may have.
        """
        wanted = 1 if few == student.batches else self._settings.rescore
        least = dict.fromkeys(options, -math.inf)
        if before is not None and self._settings.lazy:
            least |= {layer: before - most for layer, most in self._may_bring(self._settings.lazy).items()}
        scores: dict[int, float] = {}
        for layer in sorted(options, key=lambda layer: (least[layer], layer)):
            closest = lowest(scores)[:wanted]
            if len(closest) == wanted and least[layer] > scores[closest[-1]]:
                break
            # What is measured next must be the same on all processes.
            scores[layer] = hosts.broadcast(student.kl(options[layer], few), "score of a round")
        best = {layer: student.kl(options[layer]) for layer in lowest(scores)[: self._settings.rescore]}
        more = student.tokens() - student.tokens(few)
        return scores, best, len(scores) * student.tokens(few) + len(best) * more

    def _may_bring(self, growth: float) -> dict[int, float]:
        """The most that a layer's change may lower the KL by, from what it brought in the last round that tried it."""
        brought = {
            int(layer): found["before"] - kl for found in self.rounds[1:] for layer, kl in found["scores"].items()
        }
        return {layer: gain * growth if gain > 0 else gain / growth for layer, gain in brought.items()}

    def _batches(self, number: int) -> int:
        """Of round `number`: from the first one's to all of them in the last, by equal factors."""
        measure, first = self._given.settings.measure, self._settings.first_tokens
        if first is None or number + 1 >= self._expected:
            return measure.batches
        least = measure.batches_of(first)
        return round(least * (measure.batches / least) ** (number / (self._expected - 1)))


def round_of(
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


def lowest(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda layer: (scores[layer], layer))
