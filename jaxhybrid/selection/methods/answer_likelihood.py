"""Each layer alone: the fall of the log-likelihood of recall prompts' answers when its aligned mixer replaces its
attention, without training. NLL-guided selection (arXiv 2606.27791) does so with a window in place of the mixer."""

from jaxhybrid.selection.choice import Choice, Given, Method, ranked
from jaxhybrid.selection.recalled import RecallMeasureConfig, ReplacedOnce
from jaxhybrid.selection.rounds import Round, by_layer, from_layers


class AnswerLikelihoodConfig(RecallMeasureConfig):
    """Log-likelihood of answers, one layer replaced at a time."""


def choose(given: Given, count: int) -> Choice:
    def compute() -> Round:
        replaced = ReplacedOnce(given, given.own(AnswerLikelihoodConfig))
        whole = replaced.whole()
        return {
            "action": "rank",
            "scores": by_layer(whole.likelihood - found.likelihood for found in replaced.each()),
            "answered": whole.to_json(),
            "tokens": replaced.prompts.tokens.size,
            "forward_tokens": replaced.forward_tokens,
        }

    found = given.log.round(compute)
    return ranked(from_layers(found["scores"]), count, rounds=[found])


METHODS = {"answer_likelihood": Method(choose, "student", AnswerLikelihoodConfig)}
