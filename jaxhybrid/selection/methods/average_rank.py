"""The mean of a layer's ranks by several methods: AVG of arXiv 2512.20569, which takes addition and removal."""

from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from jaxhybrid.errors import ConfigError
from jaxhybrid.selection.choice import Choice, Given, Method, ranked
from jaxhybrid.settings.select import MeasureConfig, MethodConfig, methods
from jaxhybrid.settings.types import Names, about


class AverageRankConfig(MethodConfig):
    """Mean rank by several methods."""

    of: Annotated[Names, Field(min_length=2)] = about(
        ("single_kl", "replacement_kl"),
        "methods that rank every layer; kl_guided asks for scores: `jaxhybrid score` makes them",
    )

    @property
    def asks(self) -> tuple[str, ...]:
        return self.of

    def trouble(self, measure: MeasureConfig) -> str | None:
        unknown = [name for name in self.of if name not in methods() or name == "average_rank"]
        return f"of names {unknown}; it takes other methods" if unknown else None


def choose(given: Given, count: int) -> Choice:
    """
    Raises:
        ConfigError: one of the methods does not rank every layer.
    """
    ranks, rounds, trained = [], [], 0
    for name in given.own(AverageRankConfig).of:
        own = replace(given, settings=given.settings.model_copy(update={"method": name}))
        found = methods()[name].choose(own, 1)  # for one layer, removal ranks all
        if len(found.order) < given.depth:
            raise ConfigError(f"select.average_rank.of names {name}, which ranks no more than the layers it keeps.")
        ranks.append(np.argsort(found.order))
        rounds += [one | {"of": name} for one in found.rounds]
        trained += found.trained_tokens
    importance = {layer: -float(rank) for layer, rank in enumerate(np.mean(ranks, axis=0))}
    return ranked(importance, count, rounds=rounds, trained_tokens=trained)


METHODS = {"average_rank": Method(choose, "student", AverageRankConfig, answers=True)}
