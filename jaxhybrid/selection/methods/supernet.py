"""A supernet and a beam search over it, as PostNAS (Jet-Nemotron, arXiv 2508.15884): the linear mixers are trained
once, with other layers softmax in every step, and sets of layers are then compared without training any of them.

PostNAS trains on 50 billion tokens (200 by another account), distilling features with its MLPs frozen and windows as a
third kind of layer, and searches for each family of tasks by itself; here the loss is the KL, all but the mixers is
frozen, and the measure is that of `select.measure`, text and answers.
"""

from functools import cache

from jaxhybrid.selection.beam import beam_search
from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.trained_mixers import train_supernet
from jaxhybrid.settings.select import MixerTrainingConfig
from jaxhybrid.settings.types import Count, about


class SupernetConfig(MixerTrainingConfig):
    """Linear mixers trained under random sets of softmax layers, then beam search."""

    beam: Count = about(4, "sets that a round of the search keeps")
    draws_seed: int = about(0, "seed of the sets that are trained")


def choose(given: Given, count: int) -> Choice:
    settings = given.own(SupernetConfig)

    @cache
    def trained() -> MaskedStudent:
        with given.training(settings) as batches:
            return train_supernet(given.student(), batches, settings.training, count, settings.draws_seed)

    given.log.all_or_none(count + 1)  # the mixers of a search that was stopped are gone, and others may differ
    tokens = settings.steps * settings.batch_size * settings.sequence_length
    return beam_search(given, count, settings.beam, trained, tokens)


METHODS = {"supernet": Method(choose, "student", SupernetConfig, answers=True)}
