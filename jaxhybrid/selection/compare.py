"""Choices of layers side by side: how far their sets overlap and their rankings agree; published ones among them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.selection.choice import Choice
from jaxhybrid.selection.ranking import jaccard

PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Listed:
    """A choice with a name: the layers most worth keeping in their order, all or the first ones, or a set alone."""

    name: str
    source: str  # where it comes from
    order: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    published: bool = False

    def layers(self, count: int) -> tuple[int, ...]:
        """The first `count` of the order; the set, whatever its size, where there is none."""
        return tuple(sorted(self.order[:count] if self.order else self.kept))


def of_choice(name: str, source: str, choice: Choice, depth: int) -> Listed:
    """What a method gave; a ranking only where it is one for every count."""
    if choice.importance is not None and len(choice.order) == depth:
        return Listed(name, source, order=choice.order)
    return Listed(name, source, kept=choice.layers)


def published(depth: int) -> list[Listed]:
    """Kept layers of papers and their code, for teachers of so many layers."""
    found = []
    for paper in json.loads(PUBLISHED.read_text()):
        if paper["depth"] == depth:
            teacher, source = paper["teacher"], paper["source"]
            for name, layers in paper["rankings"].items():
                found.append(Listed(f"{teacher}: {name}", source, order=tuple(layers), published=True))
            for name, layers in paper["sets"].items():
                found.append(Listed(f"{teacher}: {name}", source, kept=tuple(layers), published=True))
    return found


def comparison(lists: Sequence[Listed], depth: int, count: int) -> dict[str, Any]:
    """Every list with its layers for `count` kept ones, and for each pair of lists

    `jaccard`: of these layers; `correlation`: Spearman's of the rankings, null where one is none. The layers that a
    published ranking leaves out share its last place.
    """
    from scipy.stats import hypergeom  # half a second that no other verb should wait for

    pairs = [
        {
            "a": a.name,
            "b": b.name,
            "jaccard": jaccard(frozenset(a.layers(count)), frozenset(b.layers(count))),
            "correlation": _correlation(a, b, depth),
        }
        for number, a in enumerate(lists)
        for b in lists[number + 1 :]
    ]
    shared = np.arange(count + 1)
    chance = float(np.sum(hypergeom(depth, count, count).pmf(shared) * shared / (2 * count - shared)))
    return {
        "depth": depth,
        "count": count,
        "jaccard_of_random_sets": chance,
        "lists": [
            {"name": a.name, "source": a.source, "published": a.published, "layers": list(a.layers(count))}
            for a in lists
        ],
        "pairs": pairs,
    }


def _correlation(a: Listed, b: Listed, depth: int) -> float | None:
    from scipy.stats import spearmanr

    if not a.order or not b.order:
        return None
    places = [[one.order.index(i) if i in one.order else len(one.order) for i in range(depth)] for one in (a, b)]
    return float(spearmanr(*places).statistic)
