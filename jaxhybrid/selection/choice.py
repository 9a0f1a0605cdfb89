"""What a method of selection is given, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxhybrid.errors import ConfigError
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.selection.rounds import Round, RoundLog
from jaxhybrid.settings.select import SelectConfig

# What a method takes beside settings and depth: nothing, the scores of the score stage, the held-out losses of the
# align stage, or the aligned student, which every process must then run.
Needs = Literal["nothing", "scores", "alignment", "student"]


def _not_given(name: str) -> Any:
    raise ConfigError(f"This method needs {name}; run the stage that makes them first.")


NO_SCORES = partial(_not_given, "scores")
NO_LOSSES = partial(_not_given, "held-out alignment losses")
NO_STUDENT = partial(_not_given, "aligned mixers beside the teacher's attention")


@dataclass(frozen=True)
class Given:
    """What a method may use. What costs something is made when it is first asked for."""

    depth: int
    settings: SelectConfig
    scores: Callable[[], Scores] = NO_SCORES
    layer_losses: Callable[[], Sequence[float]] = NO_LOSSES
    student: Callable[[], MaskedStudent] = NO_STUDENT
    log: RoundLog = field(default_factory=RoundLog)


@dataclass(frozen=True)
class Choice:
    """The layers that a method keeps softmax, ascending, and what it knows of other counts.

    `order` has the layers most worth keeping first, as far as the method tells; `nested` holds the counts for which its
    choice is the first so many of them.
    """

    layers: tuple[int, ...]
    order: tuple[int, ...] = ()
    nested: range = range(0)
    importance: dict[int, float] | None = None  # of a ranking; higher: more worth keeping
    rounds: list[Round] = field(default_factory=list)
    trained_tokens: int = 0

    @property
    def forward_tokens(self) -> int:
        return sum(found["forward_tokens"] for found in self.rounds)


@dataclass(frozen=True)
class Method:
    """`choose(given, count)` keeps `count` layers, or fewer where its settings say so."""

    choose: Callable[[Given, int], Choice]
    needs: Needs = "nothing"


def exactly(layers: Sequence[int]) -> Choice:
    """A set alone."""
    return Choice(tuple(sorted(layers)))


def ranked(importance: dict[int, float], count: int, **known: Any) -> Choice:
    """The `count` most important layers; ties go to the lower index."""
    order = sorted(importance, key=lambda layer: (-importance[layer], layer))
    return Choice(tuple(sorted(order[:count])), tuple(order), range(1, len(order) + 1), importance, **known)
