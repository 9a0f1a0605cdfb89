"""A server in this process with two tiny models, and clients that speak HTTP by hand."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxhybrid.complete import complete
from jaxhybrid.data import load_vocabulary
from jaxhybrid.decoding.engine import Engine
from jaxhybrid.export.folder import export
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.serve.limits import Limits
from jaxhybrid.serve.server import bound, open_server
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_student, load_teacher
from tests.tiny import write_teacher

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.role[0] }}:{{ message.content }}\n{% endfor %}a:"
)
LIMITS = Limits(
    slots=2, context=96, max_new_tokens=64, queue=3, header_seconds=1.0, body_seconds=1.0, stuck_seconds=1.0,
    connections=40, request_seconds=60.0, grace_seconds=2.0,
)  # fmt: skip
PROMPT = "anna likes the"


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """Its answers are words, for tokens of anything else have no embedding. It asks for a repetition penalty."""
    folder = write_teacher(tmp_path_factory.mktemp("served") / "teacher", layers=2)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, "eos_token_id": 0}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    teacher = load_teacher(folder)
    letters = [i < len(tokenizer) and tokenizer.decode([i]).strip().isalpha() for i in range(teacher.config.vocab_size)]
    embedding = teacher.params["embed"]["embedding"] * np.array(letters)[:, None]
    teacher = replace(teacher, params=teacher.params | {"embed": {"embedding": embedding}})
    types = ("gated_deltanet", "full_attention")
    student = convert(teacher, types, GatedDeltaNetConfig(), jax.random.key(1))
    return export(student, folder.parent / "student", "float32")


@pytest.fixture(scope="session")
def other(student):
    """Another model of the same shape, so that it needs no programs of its own."""
    model = load_student(student)
    turned = jax.tree.map(lambda x: jnp.flip(x, -1), model.params["blocks"]["mlp"])
    params = model.params | {"blocks": model.params["blocks"] | {"mlp": turned}}
    return export(replace(model, params=params), student.parent / "other", "float32")


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
def served(student, other):
    with running(open_server([str(student), str(other)], ["student", "other"], LIMITS)) as found:
        yield found


class Gate(threading.Event):
    """While it is closed, `gate.clear()`, engines make no tokens."""

    holds = False  # an engine: it has taken the requests that had come, and takes no others


@pytest.fixture
def gate(monkeypatch):
    own, step = Gate(), Engine.step
    own.set()

    def gated(self, steps=None):
        own.holds = not own.is_set()
        assert own.wait(60)
        own.holds = False
        return step(self, steps)

    monkeypatch.setattr(Engine, "step", gated)
    yield own
    own.set()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def generated(folder, *prompts, tokens=12, **settings):
    """What `jaxhybrid generate` gives."""
    return complete(str(folder), prompts, tokens, **settings)


@pytest.fixture(scope="session")
def alone(student):
    return generated(student, PROMPT)[0]


@pytest.fixture(scope="session")
def vocabulary(student):
    return load_vocabulary(str(student), 320)
