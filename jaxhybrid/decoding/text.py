"""Text out of tokens as they come, ended at stop strings."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what tokenizers give for the first bytes of a character


class Answer:
    """The text of one answer. Pieces are given out once nothing that follows can change or end them."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.tokens: list[int] = []
        self.text = ""
        self.is_stopped = False
        self._given = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The next piece of text. A stop string sets `is_stopped`; neither it nor what follows is part of the text."""
        self.tokens += tokens
        self.text = self.decode(self.tokens)
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
            return self.rest()
        sure = self.text.rstrip(UNFINISHED)
        begun = max((_begun(sure, stop) for stop in self.stops), default=0)
        return self._piece(len(sure) - begun)

    def rest(self) -> str:
        """What `add` held back, when nothing more comes."""
        return self._piece(len(self.text))

    def _piece(self, end: int) -> str:
        start, self._given = self._given, max(self._given, end)
        return self.text[start : self._given]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
