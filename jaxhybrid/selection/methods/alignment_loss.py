"""Addition scored in stage 1: the layers whose mixers are furthest from their attention when alignment ends."""

from jaxhybrid.selection.choice import Choice, Given, Method, ranked


def choose(given: Given, count: int) -> Choice:
    return ranked({layer: float(loss) for layer, loss in enumerate(given.layer_losses())}, count)


METHODS = {"alignment_loss": Method(choose, "alignment")}
