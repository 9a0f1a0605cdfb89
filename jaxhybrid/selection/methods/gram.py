"""Gram selection: the set with the lowest KL by a quadratic form over the changes that single layers make, found
without running it. CLADO (arXiv 2307.05657) does so for bits of quantised layers. It holds where changes are small."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from jaxhybrid import hosts
from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.gram import QuadraticKl, quadratic_kl
from jaxhybrid.selection.rounds import Round
from jaxhybrid.settings.select import MethodConfig
from jaxhybrid.settings.types import about


class GramConfig(MethodConfig):
    """A quadratic form of the KL from one pass for each layer."""

    start: Literal["linear", "softmax"] = about(
        "linear", "changes are layers made softmax in the aligned student, or made linear in the teacher"
    )
    confirm: Annotated[int, Field(ge=0)] = about(
        0, "the sets that are best by the form, and one exchange from the best, whose true KL decides; 0: the form does"
    )


def choose(given: Given, count: int) -> Choice:
    settings, layers = given.own(GramConfig), frozenset(range(given.depth))
    from_softmax = settings.start == "softmax"

    def measure() -> Round:
        student = given.student()
        form, tokens = quadratic_kl(student, from_softmax), student.tokens()
        parts = {"products": form.products.tolist(), "missing": form.missing.tolist(), "start": form.start}
        return {"action": "form", **parts, "tokens": tokens, "forward_tokens": (given.depth + 2) * tokens}

    measured = given.log.round(measure)
    form = QuadraticKl(np.array(measured["products"]), np.array(measured["missing"]), measured["start"])

    def kept(changed: frozenset[int]) -> list[int]:
        return sorted(layers - changed if from_softmax else changed)

    best = form.best(given.depth - count if from_softmax else count)
    if not settings.confirm:
        return Choice(tuple(kept(best)), rounds=[measured])
    proposed = [best, *sorted(form.neighbours(best), key=form)][: settings.confirm]

    def confirm() -> Round:
        student = given.student()
        sets = [kept(changed) for changed in proposed]
        kls = hosts.broadcast([student.kl(layers) for layers in sets], "KL of proposed sets")
        found = min(range(len(sets)), key=lambda number: kls[number])
        tried = [{"kept": s, "kl": kl, "form": form(c)} for s, kl, c in zip(sets, kls, proposed)]
        tokens = student.tokens()
        return {
            "action": "confirm",
            "kept": sets[found],
            "kl": kls[found],
            "tried": tried,
            "tokens": tokens,
            "forward_tokens": len(sets) * tokens,
        }

    confirmed = given.log.round(confirm)
    return Choice(tuple(confirmed["kept"]), rounds=[measured, confirmed])


METHODS = {"gram": Method(choose, "student", GramConfig, answers=True)}
