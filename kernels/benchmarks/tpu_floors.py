"""What a recurrence cannot do without: products and bytes per token and head, at chunks of 64 tokens.

Products of chunk-sized operands (keys with keys, a chunk's triangle with values) count three passes of the matrix units
in bfloat16: one pass ruins the gradients of the gates. Products with the state count one. In float32 all count six.
Bytes are those of all arguments and results, and of what the forward of training keeps for the backward: the inverses
and the state at each chunk's entry. Inference is the forward that keeps nothing.
"""

from typing import NamedTuple

CHUNK = 64
DIRECTIONS = ("forward", "backward", "inference")


class Recurrence(NamedTuple):
    """Arguments, and for (forward, backward) the products of C x K, of C x V and of K x V per chunk of C tokens."""

    wide: tuple[str, ...]  # arguments [B,T,H,K] beside v
    decay: str | None
    beta: bool
    key_products: tuple[int, int]
    value_products: tuple[int, int]
    state_products: tuple[int, int]

    @property
    def inverts(self) -> bool:
        return self.key_products[0] > 1


def _additive(decay):
    return Recurrence(("q", "k"), decay, False, (1, 3), (1, 2), (2, 5))


def _delta(decay):
    return Recurrence(("q", "k"), decay, True, (2, 5), (2, 5), (3, 8))


RECURRENCES = {
    "linear_attention": _additive(None),
    "simple_gla": _additive("head"),
    "gla": _additive("channel"),
    "deltanet": _delta(None),
    "gated_deltanet": _delta("head"),
    "kimi_delta": _delta("channel"),
    "dplr": Recurrence(("q", "k", "a", "b"), "channel", False, (4, 12), (4, 10), (4, 9)),
}


def flops(recurrence: Recurrence, K: int, V: int, itemsize: int, direction: str) -> float:
    """Per token and head, weighted by passes."""
    backward = direction == "backward"
    chunk_passes, state_passes = (3, 1) if itemsize == 2 else (6, 6)
    chunk = recurrence.key_products[backward] * K + recurrence.value_products[backward] * V
    return 2 * CHUNK * chunk * chunk_passes + 2 * K * V * recurrence.state_products[backward] * state_passes


def traffic(recurrence: Recurrence, K: int, V: int, itemsize: int, direction: str) -> float:
    """Bytes per token and head."""
    gates = 4 * ({None: 0, "head": 1, "channel": K}[recurrence.decay] + recurrence.beta)
    kept = (direction != "inference") * (CHUNK * recurrence.inverts + K * V / CHUNK) * itemsize
    wide = len(recurrence.wide) * K * itemsize
    gradients = wide + V * itemsize + gates
    return wide + 2 * V * itemsize + gates + kept + (direction == "backward") * gradients
