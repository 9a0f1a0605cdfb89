"""The queue, the time of a request, an engine that fails, and stopping."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import openai
import pytest

from jaxhybrid.decoding.engine import Engine
from jaxhybrid.errors import ConfigError
from jaxhybrid.serve.limits import Limits
from jaxhybrid.serve.server import bound, open_server
from tests.serve.conftest import LIMITS, PROMPT, running, wait_until


def count(served, name):
    return served.metric(f"jaxhybrid_{name}", model="student")


def test_a_full_queue_refuses_and_the_rest_is_answered(served, gate, alone):
    gate.clear()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(served.complete)]
        wait_until(lambda: count(served, "running") == 1)
        asked += [pool.submit(served.complete) for _ in range(LIMITS.queue)]
        wait_until(lambda: count(served, "waiting") == LIMITS.queue)
        status, headers, body = served.complete()
        assert (status, headers["Retry-After"]) == (429, "2")
        assert body["error"]["code"] == "queue_full"
        assert "3 requests wait for student already" in body["error"]["message"]
        gate.set()
        assert [one.result()[2]["choices"][0]["text"] for one in asked] == [alone] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_with_its_time(served, gate, monkeypatch, alone, stream):
    model = served.server.batcher.models["student"]
    monkeypatch.setattr(model, "limits", replace(LIMITS, request_seconds=0.2))
    gate.clear()
    threading.Timer(0.5, gate.set).start()
    status, _, found = served.complete(max_tokens=60, stream=stream)
    if stream:
        *_, last, end = found.split("\n\n")
        found, status = json.loads(last.removeprefix("data: ")), 504
        assert end == ""
    assert (status, found["error"]["code"]) == (504, "timeout")
    assert "within the 0.2 s of a request" in found["error"]["message"]
    monkeypatch.undo()
    assert served.complete()[2]["choices"][0]["text"] == alone


def test_an_engine_that_fails_fails_what_is_in_it_and_goes_on(served, monkeypatch, capfd, alone):
    step = Engine.step

    def failing(self, steps=None):
        for leaf in jax.tree.leaves(self.states):  # as after a program that failed: they were given to it
            leaf.delete()
        monkeypatch.setattr(Engine, "step", step)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(Engine, "step", failing)
    status, _, found = served.complete()
    assert (status, found["error"]["type"], found["error"]["code"]) == (500, "server_error", "engine_failed")
    assert "the device is on fire" in capfd.readouterr().err
    assert served.complete()[2]["choices"][0]["text"] == alone


def test_stopping_lets_texts_end_and_cuts_those_that_do_not(student, alone):
    """One text ends within the grace; one that is held is cut, its client told so; then all is closed."""
    held = threading.Event()
    server = open_server([str(student)], ["student"], replace(LIMITS, grace_seconds=1.0))
    engine = server.batcher.models["student"].engine
    step = engine.step
    with running(server) as served, ThreadPoolExecutor(2) as pool:
        engine.step = lambda steps: (held.wait(0.5), step(steps))[1]
        good = pool.submit(served.complete)
        endless = pool.submit(served.complete, max_tokens=64, stream=True)
        wait_until(lambda: served.metric("jaxhybrid_running", model="student") == 2)
        server.should_exit = True
        assert good.result()[2]["choices"][0]["text"] == alone
        *pieces, last, _ = endless.result()[2].split("\n\n")
        assert pieces
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        with pytest.raises(ConnectionRefusedError):
            served.complete()


def test_the_openai_client_raises_when_a_stream_is_cut(served, gate, monkeypatch):
    model = served.server.batcher.models["student"]
    monkeypatch.setattr(model, "limits", replace(LIMITS, request_seconds=0.2))
    gate.clear()
    threading.Timer(0.5, gate.set).start()
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="student", prompt=PROMPT, max_tokens=60, stream=True)
        with pytest.raises(openai.APIError, match=r"within the 0\.2 s"):
            list(stream)


@pytest.mark.parametrize("name", ["slots", "context", "queue", "request_seconds"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=f"{name}=0: use a positive value"):
        Limits(**{name: 0})
    assert Limits(grace_seconds=0).grace_seconds == 0


def test_a_state_that_does_not_fit_is_refused_before_anything_is_served(student, monkeypatch):
    def full(self, places):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Engine, "reserve", full)
    with pytest.raises(
        ConfigError, match=r"2 texts of 96 tokens of .*student does not fit.*lower --slots or --context"
    ):
        open_server([str(student)], ["student"], LIMITS)


def test_addresses_and_names_that_cannot_be_are_refused(served, student):
    with pytest.raises(ConfigError, match=f"port {served.port}: .*Choose others with --host, --port"):
        bound("127.0.0.1", served.port)
    with pytest.raises(ConfigError, match="Cannot listen at no such host"):
        bound("no such host", 0)
    with pytest.raises(ConfigError, match="Two models would have the name 'a'"):
        open_server([str(student)] * 2, ["a", "a"], LIMITS)
