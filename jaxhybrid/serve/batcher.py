"""The thread in which all engines work, one after the other: one program at a time is on the devices."""

from collections.abc import Mapping
from contextlib import nullcontext
from threading import Condition, Thread
from typing import Any

import jax

from jaxhybrid.decoding.engine import Request
from jaxhybrid.serve.errors import stopping
from jaxhybrid.serve.served import Served, Ticket


class Batcher:
    """Serves until it is closed.

    batcher = Batcher(models, changed, mesh)  # `changed` is the models' condition, too
    batcher.start()
    batcher.close()                           # all texts go on to their end, then the thread ends
    batcher.cut()                             # at once: texts that are not finished end with an error
    """

    def __init__(self, models: Mapping[str, Served], changed: Condition, mesh: Any = None):
        self.models, self.changed, self.mesh = models, changed, mesh
        self.is_closed = self.is_cut = False
        # A daemon: a program that takes longer than the server's grace must not keep the process.
        self.thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, name: str, request: Request) -> Ticket:
        """Puts a request into a model's queue.

        Raises:
            APIError: the queue is full, or the server is being stopped.
        """
        with self.changed:
            if self.is_closed:
                raise stopping()
            return self.models[name].submit(request)

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify()

    def cut(self) -> None:
        self.is_cut = True
        self.close()

    def _run(self) -> None:
        with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            while self._has_work():
                for served in self.models.values():
                    if served.has_work:
                        served.round(self.is_cut)

    def _has_work(self) -> bool:
        """Waits for work; False when there is none and never will be."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or any(s.has_work for s in self.models.values()))
            return any(served.has_work for served in self.models.values())
