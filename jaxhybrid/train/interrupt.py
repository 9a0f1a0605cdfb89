"""Being told to stop: SIGTERM and Ctrl-C end a stage at its next step, with a checkpoint."""

import signal
from types import FrameType
from typing import Any

from jaxhybrid.errors import JaxHybridError


class Interrupted(JaxHybridError):
    """The process was asked to stop; a checkpoint holds everything done so far."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignals:
    """Context in which SIGTERM and SIGINT set `received` instead of ending the process. A second Ctrl-C ends it."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
