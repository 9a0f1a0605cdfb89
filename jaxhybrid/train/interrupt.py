"""Being told to stop: SIGTERM and Ctrl-C end a stage at its next step, with a checkpoint.

On many hosts SIGTERM to any process is enough. JAX's preemption service tells the others and finds the step at which
all stop; it has its own handler for the signal, so ours stays away. Ctrl-C is passed on as SIGTERM.
"""

import os
import signal
from types import FrameType
from typing import Any

from jaxhybrid import hosts
from jaxhybrid.errors import JaxHybridError


class Interrupted(JaxHybridError):
    """The process was asked to stop; a checkpoint holds everything done so far."""

    shared = True

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignals:
    """Context in which SIGTERM and SIGINT set `received` instead of ending the process. A second Ctrl-C ends it."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT,) if hosts.are_joined() else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> int | None:
        """The signal by which to stop after this step. To be called once a step, on many hosts by all of them."""
        if hosts.are_joined():
            return (self.received or signal.SIGTERM) if hosts.stop_agreed() else None
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
        if hosts.are_joined():
            os.kill(os.getpid(), signal.SIGTERM)


def stop_between(before: str) -> None:
    """Where many hosts stop when they were asked to outside a loop; a process by itself has ended then already.

    Raises:
        Interrupted: before what `before` says.
    """
    if hosts.stop_agreed():
        number = int(signal.SIGTERM)
        raise Interrupted(f"stopped by signal {number} before {before}. Run the same command again to go on.", number)
