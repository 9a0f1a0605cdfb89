"""A client that sends what it should not, slowly, or goes away; beside it one whose answers must not change."""

import json
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import takewhile

import pytest

from tests.serve.conftest import LIMITS, PROMPT, wait_until

BODY = json.dumps({"model": "student", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
STREAM = json.dumps({"model": "student", "prompt": PROMPT, "max_tokens": 60, "stream": True}).encode()


def head(length, path="/v1/completions", extra=b""):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        + (b"Transfer-Encoding: chunked\r\n" if length is None else f"Content-Length: {length}\r\n".encode())
        + extra
        + b"\r\n"
    )


def connect(served):
    found = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    return closing(found)


def rest(connection):
    """What comes until the server ends the connection."""
    found = b""
    try:
        while part := connection.recv(65_536):
            found += part
    except ConnectionResetError:
        pass
    return found


def send(connection, data):
    """Whether all of it was taken."""
    try:
        connection.sendall(data)
    except (ConnectionResetError, BrokenPipeError):
        return False
    return True


class TestDeadlines:
    @pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", head(10)[:-2]])
    def test_a_head_that_does_not_come_ends_the_connection(self, served, sent):
        with connect(served) as connection:
            connection.sendall(sent)
            begin = time.monotonic()
            assert rest(connection) == b""
            assert 0.5 < time.monotonic() - begin < 5

    def test_a_head_letter_by_letter_ends_the_connection_even_the_second(self, served):
        with connect(served) as connection:
            connection.sendall(head(len(BODY)) + BODY)
            assert b"200 OK" in connection.recv(65_536)
            begin = time.monotonic()
            while send(connection, b"G") and time.monotonic() - begin < 10:
                time.sleep(0.05)
            assert time.monotonic() - begin < 5

    def test_half_a_body_is_answered_with_408(self, served):
        with connect(served) as connection:
            connection.sendall(head(len(BODY)) + BODY[:20])
            assert b"408 Request Timeout" in rest(connection)

    def test_a_reader_that_takes_nothing_is_cut_off(self, served):
        """The stream that it asked for is far larger than what the system holds for it."""
        server = served.server
        with connect(served) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(head(len(BODY)))
            wait_until(lambda: any(c.cycle is not None and c.cycle.more_body for c in server.server_state.connections))
            (own,) = (c for c in server.server_state.connections if c.cycle is not None and c.cycle.more_body)
            own.transport.write(b"x" * 50_000_000)
            wait_until(lambda: own not in server.server_state.connections, 10)


def test_the_connections_that_ask_for_nothing_make_room(served, monkeypatch, gate, alone):
    """However long they may take: the oldest go first, and none that waits for an answer."""
    server = served.server
    monkeypatch.setattr(server.config.http_protocol_class, "limits", replace(LIMITS, header_seconds=600))
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.complete)
        wait_until(lambda: served.metric("jaxhybrid_running", model="student") == 1)
        silent = [connect(served).thing for _ in range(60)]
        wait_until(lambda: len(server.server_state.connections) == LIMITS.connections)
        assert silent[0].recv(1) == b""
        gate.set()
        assert asked.result()[2]["choices"][0]["text"] == alone
    assert served.complete()[2]["choices"][0]["text"] == alone
    for connection in silent:
        connection.close()


class TestSizes:
    def test_a_body_that_says_it_is_huge_is_refused(self, served):
        size = 1_000_000
        with connect(served) as connection:
            send(connection, head(size) + b"x" * size)
            assert b"413 " in rest(connection)

    def test_a_body_without_end_is_cut_off(self, served):
        with connect(served) as connection:
            connection.sendall(head(None))
            chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
            taken = sum(1 for _ in takewhile(bool, (send(connection, chunk) for _ in range(10_000))))  # of 160 MB
            assert taken < 1000

    def test_a_huge_head_is_refused(self, served):
        with connect(served) as connection:
            send(connection, b"GET / HTTP/1.1\r\n" + b"X-A: " + b"x" * 100_000)
            assert rest(connection)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")

    def test_a_client_that_asks_first_does_not_send_a_body_that_is_too_large(self, served):
        with connect(served) as connection:
            connection.sendall(head(10_000_000, extra=b"Expect: 100-continue\r\n"))
            assert b"413 " in rest(connection)


class TestGoneClients:
    @pytest.mark.parametrize("body", [STREAM, STREAM.replace(b'"stream": true', b'"stream": false')])
    def test_a_text_whose_client_goes_away_leaves_its_slot(self, served, gate, body):
        before = served.metric("jaxhybrid_requests", model="student", outcome="cancelled")
        gate.clear()
        with connect(served) as connection:
            connection.sendall(head(len(body)) + body)
            wait_until(lambda: served.metric("jaxhybrid_running", model="student") == 1)
            (ticket,) = served.server.batcher.models["student"].running.values()
        wait_until(lambda: ticket.is_cancelled)
        gate.set()
        wait_until(lambda: served.metric("jaxhybrid_requests", model="student", outcome="cancelled") == before + 1)
        assert served.metric("jaxhybrid_running", model="student") == 0

    def test_requests_that_wait_leave_the_queue(self, served, gate, alone):
        gate.clear()
        connections = [connect(served).thing for _ in range(4)]
        for number, connection in enumerate(connections):
            connection.sendall(head(len(STREAM)) + STREAM)
            wait_until(lambda: gate.holds)
            wait_until(lambda number=number: served.metric("jaxhybrid_waiting", model="student") == number)
            assert served.metric("jaxhybrid_running", model="student") == 1
        for connection in connections:
            connection.close()
        wait_until(lambda: served.metric("jaxhybrid_waiting", model="student") == 0)
        gate.set()
        assert served.complete()[2]["choices"][0]["text"] == alone
        assert served.metric("jaxhybrid_running", model="student") == 0


def bad_connection(served, rng):
    """One thing that no client should do."""
    with connect(served) as connection:
        kind = rng.randrange(9)
        if kind == 0:
            send(connection, rng.randbytes(500))
        elif kind == 1:
            send(connection, head(len(BODY))[: rng.randrange(1, 60)])
        elif kind == 2:
            send(connection, head(len(BODY)) + BODY[: rng.randrange(len(BODY))])
        elif kind == 3:
            send(connection, head(400_000) + b"x" * 400_000)
        elif kind == 4:
            send(connection, head(len(BODY)) + b'{"model": "student", "prompt": "' + b"\xff" * (len(BODY) - 34) + b'"}')
        elif kind == 5:
            send(connection, head(len(STREAM)) + STREAM)
            connection.recv(10)
        elif kind == 6:
            send(connection, head(len(STREAM)) + STREAM)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
        elif kind == 7:
            send(connection, head(None) + b"zz\r\nnot a chunk\r\n")
        else:
            send(connection, (head(len(BODY), "/%ff/../x") + BODY) * 3)
        time.sleep(rng.random() / 20)


def test_a_good_client_never_notices_a_hostile_one(served, alone):
    """Hundreds of broken requests, and more silent connections than the server keeps; the model's queue has places."""
    stopped = threading.Event()

    def harm(seed):
        rng = random.Random(seed)
        while not stopped.is_set():
            bad_connection(served, rng)

    silent = [connect(served).thing for _ in range(100)]
    hostile = [threading.Thread(target=harm, args=(seed,)) for seed in range(2)]
    for thread in hostile:
        thread.start()
    try:
        for number in range(20):
            status, _, found = served.complete(stream=number % 2 == 1)
            while status == 429:  # the hostile client's well-formed requests wait, too
                status, _, found = served.complete(stream=number % 2 == 1)
            assert status == 200
            if number % 2:
                *events, done, _ = found.split("\n\n")
                assert done == "data: [DONE]"
                texts = [json.loads(one.removeprefix("data: "))["choices"][0]["text"] for one in events]
                assert "".join(texts) == alone
            else:
                assert found["choices"][0]["text"] == alone
            silent.append(connect(served).thing)
    finally:
        stopped.set()
        for thread in hostile:
            thread.join()
        for connection in silent:
            connection.close()
    server = served.server
    wait_until(lambda: not any(model.has_work for model in server.batcher.models.values()))
    wait_until(lambda: len(server.server_state.connections) == 0, 10)
    assert not server.server_state.tasks
    assert served.complete()[2]["choices"][0]["text"] == alone
