"""The command, in a process of its own: started, asked, and stopped in order."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import openai
import pytest
from typer.testing import CliRunner

from jaxhybrid.cli import app
from tests.runs import START, XLA_FLAGS
from tests.serve.conftest import PROMPT, Running, generated

pytestmark = pytest.mark.slow


@contextmanager
def command(*arguments, **environment):
    """The process of `jaxhybrid serve`, and its port once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{START}\nmain()", "serve", *map(str, arguments), "--port", "0"],
        env=os.environ | {"XLA_FLAGS": XLA_FLAGS, "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, int(re.search(r":(\d+)$", line)[1])
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("grace", ["120", "0"])
def test_sigterm_in_the_middle_of_a_stream_ends_the_process_with_0(student, grace):
    """With time for it the text comes to its end; without, its client is told that it does not."""
    with command(student, "--name", "mine", "--context", "30000", "--grace-seconds", grace) as (process, port):
        long = 400 if grace == "120" else 29_000
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            settings = {"max_tokens": long, "temperature": 0, "stream": True}
            stream = client.completions.create(model="mine", prompt=PROMPT, **settings)
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            if grace == "120":
                text = first.choices[0].text + "".join(piece.choices[0].text for piece in stream)
                assert text == generated(student, PROMPT, tokens=long)[0]
            else:
                with pytest.raises(openai.APIError, match="is being stopped"):
                    list(stream)
        assert process.wait(120) == 0


def test_an_api_key_from_the_environment_is_asked_for(student):
    with command(student, "--context", "64", JAXHYBRID_API_KEY="secret") as (process, port):
        served = Running(None, port)
        assert served.ask("/v1/models")[0] == 401
        _, _, models = served.ask("/v1/models", Authorization="Bearer secret")
        assert [model["id"] for model in models["data"]] == [str(student)]
        threading.Timer(0.1, process.send_signal, (signal.SIGINT,)).start()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "0"], "slots=0: use a positive value"),
        (["--name", "a", "--name", "b"], "2 names for 1 models"),
        (["--dtype", "float16"], "dtype=float16"),
    ],
)
def test_options_that_cannot_be_are_refused(student, options, message):
    result = CliRunner().invoke(app, ["serve", str(student), "--port", "0", *options])
    assert message in str(result.exception)
