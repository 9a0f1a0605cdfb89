"""Which layers stay softmax: the KL-guided choice and the baselines it is compared with, behind one function."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.settings.budget import check_layers, layers_in_budget
from jaxhybrid.settings.types import RankBy, UniformBy


def uniform(depth: int, count: int, by: UniformBy = "last") -> tuple[int, ...]:
    """Evenly spaced: the last layer of each of `count` groups, or the first.

    Both are published: 3, 7, ..., 27 is the list for Llama-3.2-3B (7 of 28 layers), and for Qwen2.5-3B it is every
    fourth from 0, or every eighth (0, 8, ..., 32 for 5 of 36). Where so wide a step leaves no room for the last ones,
    the first layers of groups as equal as can be are taken.
    """
    if by == "last":
        return tuple(int(np.floor((i + 1) * depth / count + 0.5)) - 1 for i in range(count))
    step = -(-depth // count)
    if (count - 1) * step < depth:
        return tuple(range(0, count * step, step))
    return tuple(i * depth // count for i in range(count))


def random(depth: int, count: int, seed: int) -> tuple[int, ...]:
    """A seeded draw without replacement."""
    return tuple(sorted(int(i) for i in np.random.default_rng(seed).choice(depth, count, replace=False)))


def explicit(depth: int, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers the user names.

    Raises:
        ConfigError: an index is out of range or named twice, or none is named.
    """
    check_layers(layers, depth)
    repeated = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if repeated:
        raise ConfigError(f"select.layers names {repeated} more than once.")
    if not layers:
        raise ConfigError("select.method=explicit needs select.layers, a list such as [2, 9, 16].")
    return tuple(sorted(layers))


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
    """Indices of the layers to keep softmax, ascending.

    Args:
        scores: gives the layers' scores; asked only by `kl_guided`.

    Raises:
        ConfigError: unknown method, or a budget or layer outside the model.
    """
    if method == "explicit":
        return explicit(depth, layers)
    count = layers_in_budget(budget, depth)
    if method == "uniform":
        return uniform(depth, count, uniform_by)
    if method == "random":
        return random(depth, count, seed)
    if method == "kl_guided":
        if scores is None:
            raise ConfigError("select.method=kl_guided needs scores; run the score stage first.")
        return tuple(sorted(scores().ranking(rank_by)[:count]))
    raise ConfigError(f"select.method={method!r} is unknown; choose kl_guided, uniform, random or explicit.")


def layer_types(depth: int, softmax_layers: Sequence[int], linear_kind: str) -> tuple[str, ...]:
    """One mixer name per layer."""
    kept = set(softmax_layers)
    return tuple(FULL_ATTENTION if i in kept else linear_kind for i in range(depth))
