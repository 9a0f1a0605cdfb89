"""Which layers stay softmax: every method behind one function. docs/selection.md compares them.

Each file here is a method, or some that are alike, and declares them in its `METHODS`; there is no other list.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import get_args

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.selection.choice import Choice, Given, Method, Needs
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.select import SelectConfig
from jaxhybrid.settings.types import RankBy, UniformBy


def _declared(modules: Iterable[ModuleType]) -> dict[str, Method]:
    """Raises ConfigError for a name that is taken, and for needs that there are not."""
    found: dict[str, Method] = {}
    for module in modules:
        for name, method in module.METHODS.items():
            if name in found or (method.settings and name in SelectConfig.model_fields):
                taken = "another method" if name in found else "a setting of select"
                raise ConfigError(f"{module.__file__} declares the method {name!r}, which is the name of {taken}.")
            if method.needs not in get_args(Needs):
                kinds = ", ".join(get_args(Needs))
                raise ConfigError(f"{module.__file__}: the method {name!r} needs {method.needs!r}; choose of {kinds}.")
            found[name] = method
    return found


METHODS = _declared(
    import_module(f"{__name__}.{file}") for file in sorted(file.name for file in iter_modules(__path__))
)


def choose(given: Given) -> Choice:
    """By the method and for the budget of `given.settings`.

    Raises:
        ConfigError: unknown method, or a budget or layer outside the model.
    """
    name = given.settings.method
    if name not in METHODS:
        raise ConfigError(f"select.method={name!r} is unknown; choose one of {', '.join(METHODS)}.")
    # Explicit layers are the budget.
    count = 0 if name == "explicit" else layers_in_budget(given.settings.budget, given.depth)
    found = METHODS[name].choose(given, count)
    named = {*found.layers, *found.order, *(found.importance or ())}
    if outside := sorted(named - set(range(given.depth))):
        raise ConfigError(f"The method {name} names layers {outside}; the model's are 0 to {given.depth - 1}.")
    if found.layers != tuple(sorted(set(found.layers))):
        raise ConfigError(f"The method {name} gives the layers {found.layers}, which are not ascending.")
    return found


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
