"""KL-guided selection (arXiv 2512.20569, GA-S2): the layers whose candidates came closest to the teacher in scoring."""

from jaxhybrid.selection.choice import Choice, Given, Method, ranked


def choose(given: Given, count: int) -> Choice:
    scores = given.scores()
    tokens = sum(candidate.heldout[-1][0] for candidate in scores.candidates)
    return ranked(scores.importance(given.settings.rank_by), count, trained_tokens=tokens)


METHODS = {"kl_guided": Method(choose, "scores")}
