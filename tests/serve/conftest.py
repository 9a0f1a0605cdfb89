"""A server in this process with two tiny models, and clients that speak HTTP by hand."""

import http.client
import json
import threading
import time
from contextlib import contextmanager

import jax
import pytest
from transformers import AutoTokenizer

from jaxhybrid.complete import complete, open_model
from jaxhybrid.decoding.engine import Engine
from jaxhybrid.export.folder import export
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.serve.limits import Limits
from jaxhybrid.serve.server import bound, open_server
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_teacher
from tests.tiny import write_teacher

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
LIMITS = Limits(
    slots=2, context=96, max_new_tokens=64, queue=3, header_seconds=1.0, body_seconds=1.0, stuck_seconds=1.0,
    connections=40, request_seconds=60.0, grace_seconds=2.0,
)  # fmt: skip
PROMPT = "anna likes the"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = write_teacher(tmp_path_factory.mktemp("served") / "teacher", layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student(teacher):
    model = load_teacher(teacher)
    types = ("gated_deltanet", "full_attention")
    return export(convert(model, types, GatedDeltaNetConfig(), jax.random.key(1)), teacher.parent / "student", "float32")


class Running:
    """A server that listens, and requests to it."""

    def __init__(self, server, port):
        self.server, self.port = server, port

    def connect(self, seconds=60):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def ask(self, path, body=None, method=None, **headers):
        """Status, headers and JSON of a request; `body` is sent as JSON, or as it is where it is bytes."""
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method or ("GET" if body is None else "POST"), path, data, kind | headers)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(text) if is_json else text.decode()

    def complete(self, prompt=PROMPT, **settings):
        body = {"model": "student", "prompt": prompt, "max_tokens": 12, "temperature": 0} | settings
        return self.ask("/v1/completions", body)

    def metric(self, name, **labels):
        for line in self.ask("/metrics")[2].splitlines():
            if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextmanager
def running(server):
    with bound("127.0.0.1", 0) as own:
        thread = threading.Thread(target=server.run, args=([own],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Running(server, own.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
            assert not server.batcher.thread.is_alive()


@pytest.fixture(scope="session")
def served(student, teacher):
    with running(open_server([str(student), str(teacher)], ["student", "teacher"], LIMITS)) as found:
        yield found


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, `gate.clear()`, engines make no tokens."""
    is_open = threading.Event()
    is_open.set()
    step = Engine.step

    def gated(self, steps=None):
        assert is_open.wait(60)
        return step(self, steps)

    monkeypatch.setattr(Engine, "step", gated)
    yield is_open
    is_open.set()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="session")
def alone(student):
    """What `generate` on the command line gives for the prompt."""
    (text,) = complete(str(student), [PROMPT], 12)
    return text


@pytest.fixture(scope="session")
def vocabulary(student):
    return open_model(str(student))[1]
