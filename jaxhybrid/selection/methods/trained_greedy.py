"""Greedy addition on true KL with a little training between its rounds: the linear mixers learn to live with the layers
kept so far before the next one is chosen.
"""

from collections.abc import Iterator
from functools import cache, partial
from itertools import repeat

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.greedy import Kept, lowest, round_of
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.rounds import Round
from jaxhybrid.selection.trained_mixers import MixerTraining
from jaxhybrid.settings.select import MixerTrainingConfig
from jaxhybrid.train.loop import HostBatch


class TrainedGreedyConfig(MixerTrainingConfig):
    """Greedy addition on true KL; between two rounds the linear mixers take an equal share of `tokens`."""


def choose(given: Given, count: int) -> Choice:
    given.log.all_or_none(count + 1)  # the mixers of a search that was stopped are gone
    with given.training(given.own(TrainedGreedyConfig)) as batches:
        rounds = _search(given, count, batches)
    order = tuple(found["layer"] for found in rounds[1:])
    return Choice(tuple(sorted(order)), order, rounds=rounds)


def _search(given: Given, count: int, batches: Iterator[HostBatch]) -> list[Round]:
    settings = given.own(TrainedGreedyConfig)

    @cache
    def training() -> MixerTraining:
        return MixerTraining(given.student(), settings.training, "Lower select.trained_greedy.learning_rate.")

    def begin() -> Round:
        student = given.student()
        kl, tokens = student.kl(()), student.tokens()
        return round_of("start", None, frozenset(), kl, tokens, {}, 2 * tokens) | {"trained_tokens": 0}

    def keep(kept: Kept, steps: int) -> Round:
        student: MaskedStudent = training().train(repeat(kept, steps), batches) if steps else given.student()
        scores = {layer: student.kl(kept | {layer}) for layer in range(given.depth) if layer not in kept}
        layer, trained = lowest(scores)[0], steps * settings.batch_size * settings.sequence_length
        forward = len(scores) * student.tokens() + trained  # the teacher's part of training
        found = round_of("keep", layer, kept | {layer}, scores[layer], student.tokens(), scores, forward)
        return found | {"trained_tokens": trained}

    rounds = [given.log.round(begin)]
    ends = [settings.steps * done // max(count - 1, 1) for done in range(count)]  # steps taken before each round
    for before, until in zip([0, *ends], ends):
        kept = frozenset(rounds[-1]["kept"])
        rounds.append(given.log.round(partial(keep, kept, until - before)))
    return rounds


METHODS = {"trained_greedy": Method(choose, "student", TrainedGreedyConfig, answers=True)}
