"""The rounds of a method that measures: written as they end, so that a method that was stopped goes on after them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxhybrid import hosts
from jaxhybrid.checksums import read_result, write_result
from jaxhybrid.train.interrupt import stop_between

# One comparison of sets, as layers.json has it (keys of `scores` and `rescored` are layers as text):
#   action          start, keep, drop or swap; beam: several sets at once; rank: a score for each layer, no set;
#                   form: a quadratic form over layers, no set; confirm: proposed sets compared
#   layer, out      what it kept or dropped; for a swap what came in (null: nothing was better) for `out`
#   kept, kl        the set after it, ascending, and its KL in nats per token on all tokens
#   scores, tokens  each option's KL (rank: importance) on so many tokens; of a lazy search those that were measured
#   before          KL of the set that the options begin from, on those tokens
#   rescored        the closest options' KL on all tokens, where `tokens` are fewer
#   forward_tokens  tokens that went through a model for it; trained_tokens: through one in training
#   beam, tried     of several sets what each keeps and its KL
#   finer           a second score for each layer, which decides between equal ones
#   of              of several methods' rounds the one whose it is: then they are no search that ends at the choice
#   answered        how well the teacher answers the questions that a score rests on
Round = dict[str, Any]


def by_layer(values: Iterable[float]) -> dict[str, float]:
    """A figure of each layer as rounds have it."""
    return {str(layer): float(value) for layer, value in enumerate(values)}


def from_layers(values: dict[str, float]) -> dict[int, float]:
    """The reverse of `by_layer`."""
    return {int(layer): value for layer, value in values.items()}


class RoundLog:
    """Rounds in `file`, if one is given. `key` says what they depend on: rounds of another key are not gone on with."""

    def __init__(self, file: Path | None = None, key: dict[str, Any] | None = None):
        self._file, self._key = file, key or {}
        self._rounds: list[Round] = hosts.by_first(self._read, "rounds of the selection")
        self._next = 0

    def round(self, compute: Callable[[], Round]) -> Round:
        """The next round, as it was written or by `compute`. All processes take the first one's numbers."""
        if self._next == len(self._rounds):
            stop_between(f"round {self._next} of the selection")
            found = compute()
            self._rounds.append(hosts.by_first(lambda: self._write(found), f"round {self._next} of the selection"))
            hosts.say(_told(self._rounds[-1]))
        self._next += 1
        return self._rounds[self._next - 1]

    def all_or_none(self, count: int) -> None:
        """The next `count` rounds are gone on with only if all were written: what they measure is not kept."""
        if len(self._rounds) < self._next + count:
            del self._rounds[self._next :]

    def _read(self) -> list[Round]:
        if self._file is None or not self._file.exists():
            return []
        found = read_result(self._file, "Delete it to select again.")
        return found["rounds"] if found["key"] == self._key else []

    def _write(self, found: Round) -> Round:
        if self._file is not None:
            write_result(self._file, {"key": self._key, "rounds": [*self._rounds, found]})
        return found


def _told(found: Round) -> str:
    action, tokens = found["action"], found["tokens"]
    if action == "rank":
        return f"select: {len(found['scores'])} layers measured on {tokens:,} tokens"
    if action == "form":
        return f"select: {len(found['missing'])} layers and their pairs measured on {tokens:,} tokens"
    done = {
        "start": "from",
        "keep": f"keeps layer {found.get('layer')}:",
        "drop": f"makes layer {found.get('layer')} linear:",
        "swap": f"{found.get('layer')} in place of {found.get('out')}:",
        "beam": f"best of {len(found.get('beam', ()))} sets:",
        "confirm": f"best of {len(found.get('tried', ()))} sets:",
    }[action]
    if action == "swap" and found["layer"] is None:
        done = f"nothing in place of {found['out']}:"
    return f"select: {done} {len(found['kept'])} layers softmax, KL {found['kl']:.4f}"
