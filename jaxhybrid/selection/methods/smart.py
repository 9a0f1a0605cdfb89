"""SMART (Zebra-Llama, arXiv 2505.17272): a layer near each end, the others at nearly even distances between them, and
of all such sets the one of the largest total sensitivity. A layer's sensitivity is how far the KL to the teacher falls
when it alone is softmax in the aligned student, without training: the score of single_kl."""

from collections.abc import Sequence
from itertools import pairwise

from jaxhybrid.selection.choice import Choice, Given, Method
from jaxhybrid.selection.measured import measure_layers, restored_kls


def spaced(sensitivity: Sequence[float], count: int) -> tuple[int, ...]:
    """The set: its first layer is the most sensitive one of the first `depth // count`, its last of the last so many;
    neighbours are floor or ceil of the mean distance apart. Ties go to the lower layers."""
    depth = len(sensitivity)
    width = depth // count
    first, last = (max(part, key=lambda layer: sensitivity[layer]) for part in (range(width), range(depth)[-width:]))
    if count == 1:
        return (max(range(depth), key=lambda layer: sensitivity[layer]),)
    least, wider = divmod(last - first, count - 1)
    # Of the beginnings of such sets the best, by the layer they end with.
    best: dict[int, tuple[float, tuple[int, ...]]] = {first: (0.0, (first,))}
    for _ in range(count - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for place, (total, layers) in best.items():
            for step in (least, least + 1) if wider else (least,):
                after = place + step
                if after <= last:
                    found = total + sensitivity[after], (*layers, after)
                    longer[after] = max(longer.get(after, found), found, key=lambda pair: pair[0])
        best = longer
    layers = best[last][1]
    assert all(b - a in (least, least + 1) for a, b in pairwise(layers))
    return layers


def choose(given: Given, count: int) -> Choice:
    found = measure_layers(given, restored_kls, given.depth + 1)
    sensitivity = [found["scores"][str(layer)] for layer in range(given.depth)]
    importance = dict(enumerate(sensitivity))
    return Choice(spaced(sensitivity, count), importance=importance, rounds=[found])


METHODS = {"smart": Method(choose, "student", answers=True)}
