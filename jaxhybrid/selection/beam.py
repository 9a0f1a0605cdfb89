"""Beam search over sets of softmax layers by true KL: greedy addition that keeps several sets in every round."""

from collections.abc import Callable

from jaxhybrid import hosts
from jaxhybrid.selection.choice import Choice, Given
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.rounds import Round


def beam_search(
    given: Given, count: int, width: int, student: Callable[[], MaskedStudent], trained_tokens: int = 0
) -> Choice:
    """`count` layers, one more in every round: of all sets with one layer more than one of the `width` best, the best.

    Args:
        student: what is measured.
        trained_tokens: it took to make it; as many went through its teacher.
    """

    def start() -> Round:
        measured = student()
        kl, tokens = measured.kl(()), measured.tokens()
        begun = _round("start", [(kl, ())], {}, tokens, 2 * tokens + trained_tokens)
        return begun | {"trained_tokens": trained_tokens}

    rounds = [given.log.round(start)]
    for _ in range(count):
        sets = [frozenset(one["kept"]) for one in rounds[-1]["beam"]]
        options = sorted({(*sorted(kept | {i}),) for kept in sets for i in range(given.depth) if i not in kept})

        def extend(options: list[tuple[int, ...]] = options) -> Round:
            measured = student()
            kls = hosts.broadcast([measured.kl(kept) for kept in options], "KL of a beam's sets")
            scores = {" ".join(map(str, kept)): kl for kept, kl in zip(options, kls)}
            best = sorted(zip(kls, options))[:width]
            tokens = measured.tokens()
            return _round("beam", best, scores, tokens, len(options) * tokens)

        rounds.append(given.log.round(extend))
    return Choice(tuple(rounds[-1]["kept"]), rounds=rounds)


def _round(
    action: str, best: list[tuple[float, tuple[int, ...]]], scores: dict[str, float], tokens: int, forward_tokens: int
) -> Round:
    kl, kept = best[0]
    return {
        "action": action,
        "layer": None,
        "kept": list(kept),
        "kl": kl,
        "beam": [{"kept": list(kept), "kl": kl} for kl, kept in best],
        "tokens": tokens,
        "scores": scores,
        "forward_tokens": forward_tokens,
    }
