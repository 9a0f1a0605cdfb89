"""`vllm serve` over an export: greedy answers through its OpenAI-compatible API, many at once, against JAX's."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

SERVED = "gated_deltanet"
PATIENCE = 240  # seconds until it answers


@pytest.fixture(scope="module")
def server(pytestconfig, tmp_path_factory):
    """Where it listens. It is another process, started as a user starts it, and ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    try:
        version("vllm")
        serve = ("vllm.entrypoints.cli.main", "serve")
    except PackageNotFoundError:  # a build under another name, whose command line asks for that one and fails
        serve = ("vllm.entrypoints.openai.api_server", "--model")
    command = [
        *(sys.executable, "-m", *serve, str(pytestconfig.getoption("--students") / SERVED)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "student", "--dtype", "float32"),
        *("--max-model-len", "512", "--max-num-batched-tokens", "64", "--max-num-seqs", "4", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--gpu-memory-utilization", "0.05"),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(PATIENCE):
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except (URLError, TimeoutError):
                assert process.poll() is None, log.read_text()[-5000:]
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-5000:])
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def asked(server, path, **settings):
    body = {"model": "student", "temperature": 0, "ignore_eos": True, **settings}
    request = Request(f"{server}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urlopen(request, timeout=120)


@pytest.fixture(scope="module")
def answers(pytestconfig):
    return json.loads((pytestconfig.getoption("--students") / "answers.json").read_text())


def test_completions(server, answers):
    """All prompts at once, twice over; four sequences are computed together, the others wait."""

    def ask(pair):
        length = len(pair["answer"].split())
        with asked(server, "/v1/completions", prompt=pair["prompt"], max_tokens=length) as response:
            return json.load(response)["choices"][0]["text"].split()

    asked_for = answers * 2
    with ThreadPoolExecutor(len(asked_for)) as pool:
        for pair, answer in zip(asked_for, pool.map(ask, asked_for)):
            assert answer == pair["answer"].split()


def test_chat_as_a_stream(server, answers):
    pair = answers[1]
    messages = [{"role": "user", "content": pair["prompt"]}]
    length = len(pair["answer"].split())
    pieces = []
    with asked(server, "/v1/chat/completions", messages=messages, max_tokens=length, stream=True) as response:
        for line in response:
            text = line.decode().removeprefix("data: ").strip()
            if text and text != "[DONE]":
                pieces += [choice["delta"].get("content") or "" for choice in json.loads(text)["choices"]]
    assert len([piece for piece in pieces if piece]) > length // 2
    assert "".join(pieces).split() == pair["answer"].split()
