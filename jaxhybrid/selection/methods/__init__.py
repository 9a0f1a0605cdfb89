"""Which layers stay softmax: every method behind one function. docs/selection.md compares them.

Each file here is a method, or some that are alike, and declares them in its `METHODS`; there is no other list.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.select import SelectConfig
from jaxhybrid.settings.types import RankBy, UniformBy

METHODS: dict[str, Method] = {
    name: method
    for file in sorted(module.name for module in iter_modules(__path__))
    for name, method in import_module(f"{__name__}.{file}").METHODS.items()
}


def choose(given: Given) -> Choice:
    """By the method and for the budget of `given.settings`.

    Raises:
        ConfigError: unknown method, or a budget or layer outside the model.
    """
    name = given.settings.method
    if name not in METHODS:
        raise ConfigError(f"select.method={name!r} is unknown; choose one of {', '.join(METHODS)}.")
    if name == "explicit":  # the layers are the budget
        return METHODS[name].choose(given, 0)
    return METHODS[name].choose(given, layers_in_budget(given.settings.budget, given.depth))


def select_layers(
    method: str,
    depth: int,
    budget: int | float,
    *,
    layers: Sequence[int] = (),
    seed: int = 0,
    uniform_by: UniformBy = "last",
    scores: Callable[[], Scores] | None = None,
    rank_by: RankBy = "heldout",
) -> tuple[int, ...]:
    """Indices of the layers to keep softmax, ascending, by a method that needs no student.

    Args:
        scores: gives the layers' scores; asked only by `kl_guided`.

    Raises:
        ConfigError: as `choose`, or the method needs what is not given.
    """
    settings = SelectConfig.model_construct(
        method=method, budget=budget, layers=tuple(layers), seed=seed, uniform=uniform_by, rank_by=rank_by
    )
    given = Given(depth, settings) if scores is None else Given(depth, settings, scores)
    return choose(given).layers


def layer_types(depth: int, softmax_layers: Sequence[int], linear_kind: str) -> tuple[str, ...]:
    """One mixer name per layer."""
    kept = set(softmax_layers)
    return tuple(FULL_ATTENTION if i in kept else linear_kind for i in range(depth))
