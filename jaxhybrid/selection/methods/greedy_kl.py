"""From the aligned all-linear student, the layer that lowers KL(teacher, student) most stays softmax, and again.

No candidate is trained. Every round measures the sets that differ from the best one so far by one layer.
"""

from typing import Annotated

from pydantic import Field

from jaxhybrid.selection.beam import beam_search
from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.greedy import Search, SearchConfig
from jaxhybrid.settings.select import MeasureConfig
from jaxhybrid.settings.types import Count, about


class GreedyKlConfig(SearchConfig):
    """Greedy addition on true KL: from the aligned all-linear student, the layer that lowers KL most stays softmax."""

    stop_kl: Annotated[float, Field(gt=0)] | None = about(
        None, "keep no further layer once the KL is at most this; the budget is then the most"
    )
    swaps: bool = about(False, "afterwards exchange single layers until no exchange lowers the KL")
    beam: Count = about(1, "sets that a round keeps, each extended by every layer; more than 1 is a beam search")

    def trouble(self, measure: MeasureConfig) -> str | None:
        if self.beam > 1 and (self.first_tokens or self.lazy or self.swaps or self.stop_kl):
            return f"beam {self.beam} goes without first_tokens, lazy, swaps and stop_kl"
        return super().trouble(measure)


def choose(given: Given, count: int) -> Choice:
    settings, depth = given.own(GreedyKlConfig), given.depth
    if settings.beam > 1:
        return beam_search(given, count, settings.beam, given.student)
    search = Search(given, settings, frozenset(), count)
    order: list[int] = []
    while len(order) < count and not (order and settings.stop_kl and search.kl <= settings.stop_kl):
        options = {layer: search.kept | {layer} for layer in range(depth) if layer not in search.kept}
        order.append(search.step("keep", options))
    if settings.swaps:
        _exchange(search, order, depth)
    least = 1 if search.alike and not settings.swaps else len(order)
    return Choice(tuple(sorted(order)), tuple(order), range(least, len(order) + 1), rounds=search.rounds)


def _exchange(search: Search, order: list[int], depth: int) -> None:
    """Exchanges layers of `order` until no exchange of one lowers the KL."""
    unchanged, place = 0, 0
    while unchanged < len(order) and len(order) < depth:
        out, kept = order[place], search.kept
        options = {layer: kept - {out} | {layer} for layer in range(depth) if layer not in kept}
        layer = search.swap(out, options)
        if layer is None:
            unchanged += 1
        else:
            order[place], unchanged = layer, 1
        place = (place + 1) % len(order)


METHODS = {"greedy_kl": Method(choose, "student", GreedyKlConfig, answers=True)}
