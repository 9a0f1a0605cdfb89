"""How many layers stay softmax, as settings say it, and which layers a model has."""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from jaxhybrid.errors import ConfigError
from jaxhybrid.settings.types import as_tuple


def _check_budget(value: int | float) -> int | float:
    if value < 0 if isinstance(value, int) else not 0 < value < 1:
        raise ValueError(f"{value} is neither a number of layers nor a share between 0 and 1")
    return value


Budget = Annotated[int | float, AfterValidator(_check_budget)]  # softmax layers: how many, or a share of the depth
Budgets = Annotated[tuple[Budget, ...], BeforeValidator(as_tuple)]


def layers_in_budget(budget: int | float, depth: int, key: str = "budget") -> int:
    """How many layers a budget keeps softmax: a count, or a fraction of the depth rounded half up, as in the papers.

    Raises:
        ConfigError: fewer than one layer or more than `depth`; calls the budget `key`.
    """
    if isinstance(budget, float) and not 0 < budget < 1:
        raise ConfigError(f"{key} {budget}: a fraction lies between 0 and 1; write a whole number for a count.")
    count = math.floor(budget * depth + 0.5) if isinstance(budget, float) else budget
    if count > depth:
        raise ConfigError(f"{key} {budget} keeps {count} layers, but the model has {depth}. Choose at most {depth}.")
    if count < 1:
        raise ConfigError(
            f"{key} {budget} keeps no softmax layer of {depth}. Keep at least 1: without one, recall collapses "
            "and transformers cannot generate from the export."
        )
    return count


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises ConfigError naming the layers that a model of `depth` layers does not have."""
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ConfigError(f"select.layers names {outside}; the model's layers are 0 to {depth - 1}.")
