"""What a method of selection is given, and what it returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.selection.rounds import Round, RoundLog
from jaxhybrid.settings.select import MethodConfig, SelectConfig, TrainingConfig
from jaxhybrid.train.loop import HostBatch

# What a method takes beside settings and depth: nothing, the scores of the score stage, the held-out losses of the
# align stage, or what every process must then run: the teacher alone, or the aligned student beside it.
Needs = Literal["nothing", "scores", "alignment", "teacher", "student"]


def _not_given(name: str, *_: Any) -> Any:
    raise ConfigError(f"This method needs {name}; run the stage that makes them first.")


NO_SCORES = partial(_not_given, "scores")
NO_LOSSES = partial(_not_given, "held-out alignment losses")
NO_STUDENT = partial(_not_given, "aligned mixers beside the teacher's attention")
NO_TEACHER = partial(_not_given, "the teacher")
NO_VOCABULARY = partial(_not_given, "a tokenizer")
NO_TRAINING = partial(_not_given, "training text")


@dataclass(frozen=True)
class Given:
    """What a method may use. What costs something is made when it is first asked for."""

    depth: int
    settings: SelectConfig
    scores: Callable[[], Scores] = NO_SCORES
    layer_losses: Callable[[], Sequence[float]] = NO_LOSSES
    student: Callable[[], MaskedStudent] = NO_STUDENT
    teacher: Callable[[], Model] = NO_TEACHER  # in the compute dtype, on the active mesh
    vocabulary: Callable[[], Vocabulary] = NO_VOCABULARY
    training: Callable[[TrainingConfig], AbstractContextManager[Iterator[HostBatch]]] = NO_TRAINING  # never ends
    log: RoundLog = field(default_factory=RoundLog)

    def own[S: MethodConfig](self, kind: type[S]) -> S:
        """The settings of the method, which are of this kind."""
        found = self.settings.own
        if not isinstance(found, kind):
            raise ConfigError(f"The method {self.settings.method} declares other settings than {kind.__name__}.")
        return found


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

    @property
    def cost(self) -> tuple[int, int]:
        """Tokens that went through a model forward only, and in training."""
        return self.forward_tokens, self.trained_tokens + sum(found.get("trained_tokens", 0) for found in self.rounds)


@dataclass(frozen=True)
class Method:
    """`choose(given, count)` keeps `count` layers, or fewer where its settings say so."""

    choose: Callable[[Given, int], Choice]
    needs: Needs = "nothing"
    settings: type[MethodConfig] | None = None
    answers: bool = False  # whether the share of answers in `select.measure` counts
    drawn: bool = False  # whether its layers are the user's or chance's, and say nothing of the model

    @property
    def measures_text(self) -> bool:
        return self.needs == "student"

    @property
    def runs_models(self) -> bool:
        """Then every process must take part."""
        return self.needs in ("teacher", "student")


def exactly(layers: Sequence[int]) -> Choice:
    """A set alone."""
    return Choice(tuple(sorted(layers)))


def ranked(importance: dict[int, float], count: int, finer: dict[int, float] | None = None, **known: Any) -> Choice:
    """The `count` most important layers; ties go to the one of more `finer` importance, then to the lower index."""
    finer = finer or dict.fromkeys(importance, 0.0)
    order = sorted(importance, key=lambda layer: (-importance[layer], -finer[layer], layer))
    return Choice(tuple(sorted(order[:count])), tuple(order), range(1, len(order) + 1), importance, **known)
