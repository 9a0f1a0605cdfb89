"""A connection with deadlines: no client can hold one by sending or taking nothing."""

import asyncio
import time
from collections.abc import Collection

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxhybrid.serve.limits import Limits


class Connection(H11Protocol):
    """uvicorn's protocol, which has a deadline for idle connections only."""

    limits: Limits  # set by `connections_within`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = time.monotonic()  # of the head of the request that it waits for
        self.unsent = 0
        there = [other for other in self.connections if not other.transport.is_closing()]
        if len(there) > self.limits.connections:
            # The longest of those that have not asked for anything yet makes room; without another one this one does.
            asking = [other for other in there if isinstance(other, Connection) and other.is_asking]
            min(asking, key=lambda other: other.since).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.is_idle:
            self.since = time.monotonic()
        super().data_received(data)

    @property
    def is_idle(self) -> bool:
        """Between two requests, with nothing of the next one."""
        return self.cycle is not None and self.cycle.response_complete and not self.conn.trailing_data[0]

    @property
    def is_asking(self) -> bool:
        """Part of a request may be missing."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def check(self, now: float) -> None:
        """Ends a connection whose request or whose reader is too slow."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self.unsent:
            self.unsent, self.moved = unsent, now
        elif now - self.moved > self.limits.stuck_seconds:
            self.transport.abort()
        no_head = self.conn.their_state is h11.IDLE and not self.is_idle
        if no_head and now - self.since > self.limits.header_seconds:
            self.transport.abort()


def connections_within(limits: Limits) -> type[Connection]:
    """The protocol class for uvicorn."""
    return type("Connection", (Connection,), {"limits": limits})


async def watch(connections: Collection[object]) -> None:
    """Checks connections until it is cancelled."""
    while True:
        now = time.monotonic()
        for connection in list(connections):
            if isinstance(connection, Connection):
                connection.check(now)
        await asyncio.sleep(0.5)
