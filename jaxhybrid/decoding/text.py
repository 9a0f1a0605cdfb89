"""Text out of tokens as they come, ended at stop strings."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what tokenizers give for the first bytes of a character


class Answer:
    """The text of one answer. Pieces are given out once nothing that follows can change or end them.

    When more comes only the last tokens are decoded again: those since the last but one look at which no character was
    unfinished.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.tokens: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._given = 0
        self._whole = ""  # the text of the first `_read` tokens; those from `_start` on are decoded with what follows
        self._start = self._read = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The next piece of text. A stop string sets `is_stopped`; neither it nor what follows is part of the text, and
        the token that completes it is the last of `tokens`."""
        self.tokens += tokens
        known = len(self.decode(self.tokens[self._start : self._read]))
        self.text = self._first(len(self.tokens), known)
        if self._stop_in(self.text) is not None:
            ends = range(len(self.tokens) - len(tokens) + 1, len(self.tokens) + 1)
            end = next(n for n in ends if self._stop_in(self._first(n, known)) is not None)
            self.tokens, text = self.tokens[:end], self._first(end, known)
            self.text, self.is_stopped = text[: self._stop_in(text)], True
            return self.rest()
        sure = self.text.rstrip(UNFINISHED)
        if len(self.text) == len(sure) > len(self._whole):
            self._whole, self._start, self._read = self.text, self._read, len(self.tokens)
        begun = max((_begun(sure, stop) for stop in self.stops), default=0)
        return self._piece(len(sure) - begun)

    def _first(self, count: int, known: int) -> str:
        """The text of the first tokens; `known` characters of what is decoded anew are in `_whole` already."""
        return self._whole + self.decode(self.tokens[self._start : count])[known:]

    def _stop_in(self, text: str) -> int | None:
        """Where the first stop string begins; none does within `_whole`, but one may end behind it."""
        starts = (text.find(stop, max(0, len(self._whole) - len(stop))) for stop in self.stops)
        return min((start for start in starts if start >= 0), default=None)

    def rest(self) -> str:
        """What `add` held back, when nothing more comes."""
        return self._piece(len(self.text))

    def _piece(self, end: int) -> str:
        start, self._given = self._given, max(self._given, end)
        return self.text[start : self._given]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
