"""Connections that tell of a death: every process of a run holds one to the first, and the system closes a dead one's.

Nothing is sent but who is there, once, and a goodbye by a process that ends by itself. A machine that loses its power
closes nothing: that is left to JAX's heartbeat. When the first process dies JAX's service is gone, which JAX notices.
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable

GOODBYE = b"."
HELLO_SECONDS = 10  # for a process that has connected to say who it is
OnDeath = Callable[[int, str], None]  # gets the process's number and its host

_held: list[socket.socket] = []


def serve(on_death: OnDeath) -> tuple[int, str]:
    """The first process's ends of the lines: (port, the key that the others show). `on_death` is called in a thread."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    key = secrets.token_hex(8)
    threading.Thread(target=_serve, args=(server, key, on_death), name="lifelines", daemon=True).start()
    return server.getsockname()[1], key


def connect(address: tuple[str, int], key: str, process: int, host: str) -> None:
    """Another process's end.

    Raises:
        OSError: the first process cannot be reached there.
    """
    line = socket.create_connection(address, timeout=HELLO_SECONDS)
    line.sendall(json.dumps([key, process, host]).encode() + b"\n")
    _held.append(line)


def goodbye() -> None:
    """This process ends by itself, whatever for."""
    for line in _held:
        with contextlib.suppress(OSError):  # the other one may be gone
            line.sendall(GOODBYE)


def _serve(server: socket.socket, key: str, on_death: OnDeath) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select():
                if ready.data is None:
                    line, _ = server.accept()
                    if (who := _hello(line, key)) is None:
                        line.close()
                    else:
                        selector.register(line, selectors.EVENT_READ, (line, *who))
                else:
                    line, process, host = ready.data
                    selector.unregister(line)
                    if not _said_goodbye(line):
                        on_death(process, host)


def _said_goodbye(line: socket.socket) -> bool:
    with line, contextlib.suppress(OSError):
        return line.recv(1) == GOODBYE
    return False


def _hello(line: socket.socket, key: str) -> tuple[int, str] | None:
    """Who has connected; None: nobody of this run."""
    line.settimeout(HELLO_SECONDS)
    try:
        with line.makefile("rb") as said:
            shown, process, host = json.loads(said.readline(1000))
    except (OSError, ValueError, TypeError):
        return None
    line.settimeout(None)
    return (process, host) if shown == key else None
