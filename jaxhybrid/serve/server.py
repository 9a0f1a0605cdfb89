"""Starting and stopping: models are loaded, a port is listened on, and SIGTERM or Ctrl-C ends it in order."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from threading import Condition
from typing import Any, NoReturn

import jax
import uvicorn

from jaxhybrid.complete import decoding_mesh
from jaxhybrid.errors import ConfigError
from jaxhybrid.serve.app import LOCAL_HOSTS, App, make_app
from jaxhybrid.serve.batcher import Batcher
from jaxhybrid.serve.connection import connections_within, watch
from jaxhybrid.serve.limits import Limits
from jaxhybrid.serve.metrics import Metrics
from jaxhybrid.serve.served import open_served

HEAD_BYTES = 16_384  # of a request's first line and headers
END_SECONDS = 10  # for the last events of texts that are cut, and for the engine's last step


class Server(uvicorn.Server):
    """uvicorn's server with the engine's thread beside it."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher, limits: Limits):
        super().__init__(config)
        self.batcher, self.limits = batcher, limits

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.batcher.start()
        watching = asyncio.create_task(watch(self.server_state.connections))
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()
            self.batcher.cut()
            await asyncio.to_thread(self.batcher.thread.join, END_SECONDS)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        print(f"serving {' and '.join(self.batcher.models)} at http://{where}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Texts that are under way and those in the queue have `grace_seconds` to end; then they are cut."""
        self.batcher.close()
        cut = asyncio.get_running_loop().call_later(self.limits.grace_seconds, self.batcher.cut)
        await super().shutdown(sockets)
        cut.cancel()


def open_server(
    folders: Sequence[str],
    names: Sequence[str],
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    dtype: str = "float32",
    tensor: int = 1,
) -> Server:
    """Loads the models and makes a server of them; `serve` of it listens.

    Raises:
        ConfigError: two models have one name, or a setting is out of range.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"Two models would have the name {names[0]!r}; give each its own with --name.")
    mesh = decoding_mesh(dtype, tensor)
    changed, metrics = Condition(), Metrics()
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        models = {
            name: open_served(folder, name, limits, metrics, changed, mesh, dtype)
            for folder, name in zip(folders, names)
        }
    batcher = Batcher(models, changed, mesh)
    hosts = (*LOCAL_HOSTS, host.lower()) if is_local(host) else None
    config = uvicorn.Config(
        make_app(App(batcher, limits, metrics), api_key, hosts),
        http=connections_within(limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(limits.grace_seconds) + END_SECONDS,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    return Server(config, batcher, limits)


def is_local(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address that is free; nobody is answered before the server listens there.

    Raises:
        ConfigError: the address is taken, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Cannot listen at {host}, port {port}: {error}. Choose others with --host, --port."
        ) from error
    return own


def serve(folders: Sequence[str], names: Sequence[str], limits: Limits, *, port: int, **settings: Any) -> NoReturn:
    """Serves until SIGTERM or Ctrl-C, then ends the process with 0."""
    host = settings["host"]
    with bound(host, port) as own:
        if not is_local(host) and not settings["api_key"]:
            print(f"warning: whoever reaches {host} can use this server; set an API key.", file=sys.stderr)
        server = open_server(folders, names, limits, **settings)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has stopped
            signal.signal(number, server.handle_exit)
        server.run([own])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do; the interpreter would wait for a long program, and take seconds to leave JAX
