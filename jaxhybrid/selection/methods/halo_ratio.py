"""HALO's ratio (arXiv 2601.22156): what replacing a layer by its aligned mixer costs in recall, over what it costs in
common sense. Benchmarks are not in this package, so here recall is the share of right answers to made-up recall
prompts, and common sense is replaced by held-out text: the geometric mean of the probabilities of its next tokens.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxhybrid.selection.choice import Choice, Given, Method, ranked
from jaxhybrid.selection.recalled import RecallMeasureConfig, ReplacedOnce
from jaxhybrid.selection.rounds import Round, by_layer, from_layers
from jaxhybrid.settings.types import about

EPSILON = 1e-10
CAP = 50.0  # of the published code's ratio


class HaloRatioConfig(RecallMeasureConfig):
    """Fall of recall over fall of text likelihood, one layer replaced at a time."""

    form: Literal["paper", "code"] = about(
        "code", "falls from the teacher (paper), or from the best of the replaced models with a cap of 50 (its code)"
    )


def ratios(recall: Sequence[float], text: Sequence[float], whole: tuple[float, float], form: str) -> list[float]:
    """Of each layer, from both figures without it; `whole` has those of the teacher.

    A replacement that costs no likelihood of text has a fall of zero there, and with the paper's form no bound.
    """
    recall_top, text_top = whole if form == "paper" else (max(recall), max(text))
    falls = recall_top - np.array(recall), np.maximum(text_top - np.array(text), 0.0)
    found = falls[0] / (falls[1] + EPSILON)
    return (found if form == "paper" else np.minimum(found, CAP)).tolist()


def choose(given: Given, count: int) -> Choice:
    settings, layers = given.own(HaloRatioConfig), frozenset(range(given.depth))

    def compute() -> Round:
        replaced = ReplacedOnce(given, settings)
        student, whole = replaced.student, replaced.whole()
        recall = [found.right for found in replaced.each()]
        text = [float(np.exp(-student.cross_entropy(layers - {layer}))) for layer in sorted(layers)]
        text_whole = float(np.exp(-student.cross_entropy(layers)))
        tokens = student.tokens()
        return {
            "action": "rank",
            "scores": by_layer(ratios(recall, text, (whole.right, text_whole), settings.form)),
            "answered": whole.to_json(),
            "recall": by_layer(recall),
            "text_likelihood": by_layer(text) | {"whole": text_whole},
            "tokens": tokens,
            "forward_tokens": replaced.forward_tokens + (given.depth + 2) * tokens,
        }

    found = given.log.round(compute)
    return ranked(from_layers(found["scores"]), count, rounds=[found])


METHODS = {"halo_ratio": Method(choose, "student", HaloRatioConfig)}
