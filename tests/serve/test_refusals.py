"""What is refused: each by an error in OpenAI's form that names the value, whatever is sent."""

import openai
import pytest

from jaxhybrid.serve.app import App, make_app
from jaxhybrid.serve.metrics import Metrics
from tests.serve.conftest import LIMITS, PROMPT

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"model": "student", "prompt": PROMPT, "max_tokens": 2}
SAID = {"model": "student", "messages": [{"role": "user", "content": "anna"}], "max_tokens": 2}


def says(role, content):
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("path", "changes", "status", "code", "param", "message"),
    [
        (TEXT, {"model": "gpt-4"}, 404, "model_not_found", "model", "'gpt-4' is not served here; there is student"),
        (TEXT, {"model": None}, 400, "invalid_value", "model", "valid string (given: None)"),
        (TEXT, {"prompt": 5}, 400, "invalid_value", "prompt", "valid string; or prompt.list[int]: Input should be"),
        (TEXT, {"prompt": ["a", "b"]}, 400, "unsupported_parameter", "prompt", "2 prompts in one request"),
        (TEXT, {"prompt": []}, 400, "invalid_value", None, "Prompt 0 is empty"),
        (TEXT, {"prompt": [1, 320]}, 400, "invalid_value", None, "token 320; the vocabulary has 320"),
        (TEXT, {"prompt": [-1]}, 400, "invalid_value", None, "token -1"),
        (TEXT, {"prompt": PROMPT * 40}, 400, "context_length_exceeded", None, "than the 96 there may be"),
        (TEXT, {"prompt": [1] * 60, "max_tokens": 37}, 400, "context_length_exceeded", "max_tokens", "60 tokens of"),
        (TEXT, {"max_tokens": 65}, 400, "invalid_value", "max_tokens", "an answer may have 64 tokens here"),
        (TEXT, {"max_tokens": 0}, 400, "invalid_value", "max_tokens", "greater than or equal to 1 (given: 0)"),
        (TEXT, {"max_tokens": "9"}, 400, "invalid_value", "max_tokens", "valid integer (given: 9)"),
        (TEXT, {"max_tokens": True}, 400, "invalid_value", "max_tokens", "valid integer (given: True)"),
        (TEXT, {"temperature": -1}, 400, "invalid_value", "temperature", "use 0 for greedy"),
        (TEXT, {"top_p": 1.5}, 400, "invalid_value", "top_p", "top_p=1.5: use a probability"),
        (TEXT, {"seed": -4}, 400, "invalid_value", "seed", "seed=-4: use an integer"),
        (TEXT, {"top_k": 2**40}, 400, "invalid_value", "top_k", "top_k=1099511627776"),
        (TEXT, {"stop": ""}, 400, "invalid_value", "stop", "at most 4 texts of 1 to 1000"),
        (TEXT, {"stop": list("abcde")}, 400, "invalid_value", "stop", "at most 4 texts"),
        (TEXT, {"stream": "yes"}, 400, "invalid_value", "stream", "valid boolean (given: yes)"),
        (TEXT, {"n": 2}, 400, "unsupported_parameter", "n", "n=2: not built in this server"),
        (TEXT, {"n": True}, 400, "unsupported_parameter", "n", "n=True"),
        (TEXT, {"logprobs": 0}, 400, "unsupported_parameter", "logprobs", "logprobs=0: not built"),
        (TEXT, {"presence_penalty": 0.5}, 400, "unsupported_parameter", "presence_penalty", "presence_penalty=0.5"),
        (TEXT, {"echo": True}, 400, "unsupported_parameter", "echo", "echo=True"),
        (TEXT, {"max_token": 5}, 400, "unknown_parameter", "max_token", "max_token: no parameter of this endpoint"),
        (TEXT, {"messages": []}, 400, "unknown_parameter", "messages", "no parameter of this endpoint"),
        (CHAT, {"logprobs": True}, 400, "unsupported_parameter", "logprobs", "logprobs=True: not built"),
        (CHAT, {"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools", "'function'"),
        (CHAT, {"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format", "json_"),
        (CHAT, {"messages": []}, 400, "invalid_value", "messages", "at least 1 item"),
        (CHAT, {"messages": "hello"}, 400, "invalid_value", "messages", "valid array (given: hello)"),
        (CHAT, says("tool", "5"), 400, "invalid_value", "messages", "'system', 'user' or 'assistant' (given: tool)"),
        (CHAT, says("user", [{"type": "image_url", "image_url": "x"}]), 400, "invalid_value", "messages", "'text'"),
        (CHAT, says("system", "x"), 400, "invalid_value", "messages", "refuses these messages: no system here"),
        (CHAT, says("user", "anna " * 200), 400, "context_length_exceeded", None, "more than the 96 there may be"),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_named(path, changes, status, code, param, message, served):
    found, _, body = served.ask(path, (GOOD if path == TEXT else SAID) | changes)
    assert (found, body["error"]["code"], body["error"]["param"]) == (status, code, param), body
    assert message in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"model": "student", "prompt": "\xff\xfe"}', "no JSON"),
        (b'{"model": "student", "prompt": "\\ud800"}', "no JSON"),
        (b"[" * 50_000, "no JSON"),
        (b'{"temperature": 1e999, "model": "student", "prompt": "a"}', "temperature: Input should be a finite number"),
        (b'{"temperature": NaN, "model": "student", "prompt": "a"}', "temperature: Input should be a finite number"),
        (b"[]", "no JSON object"),
        (b'"anna"', "no JSON object"),
        (b'{"prompt": "anna"}', "model: Field required"),
        (b'{"model": "student"}', "prompt: Field required"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body, message, served):
    status, _, found = served.ask(TEXT, body)
    assert status == 400
    assert message in found["error"]["message"]


def test_parameters_that_ask_for_nothing_are_taken(served, alone):
    nothing = {"n": 1, "logprobs": None, "best_of": 1, "echo": False, "frequency_penalty": 0.0, "presence_penalty": 0,
               "logit_bias": {}, "user": "me", "stop": None, "seed": None, "top_p": 1}  # fmt: skip
    assert served.complete(**nothing)[2]["choices"][0]["text"] == alone


@pytest.mark.parametrize(
    ("method", "path", "kind", "status", "message"),
    [
        ("GET", "/v1/chat", None, 404, "GET /v1/chat: not found."),
        ("GET", "/v1/models/none", None, 404, "'none' is not served here"),
        ("GET", TEXT, None, 405, "GET /v1/completions: method not allowed."),
        ("POST", "/health", "application/json", 405, "method not allowed"),
        ("POST", TEXT, "text/plain", 415, "Content-Type 'text/plain': send application/json."),
        ("POST", TEXT, "", 415, "send application/json"),
    ],
)
def test_wrong_paths_methods_and_types_are_refused(method, path, kind, status, message, served):
    headers = {} if kind is None else {"Content-Type": kind}
    found, _, body = served.ask(path, None if kind is None else b"{}", method, **headers)
    assert found == status
    assert message in body["error"]["message"]


def test_only_names_of_this_machine_are_answered(served):
    """A page of the web may have its own name point here."""
    for host, status in (("localhost:99", 200), ("[::1]:8000", 200), ("[::1]", 200), ("evil.example", 403), ("", 403)):
        assert served.ask("/v1/models", Host=host)[0] == status, host


def test_an_api_key_is_asked_for(served):
    config = served.server.config
    app = App(served.server.batcher, LIMITS, Metrics())
    before, config.loaded_app = config.loaded_app, make_app(app, api_key="sésame", hosts=None)
    try:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": b"sesame"}):
            status, _, body = served.ask(TEXT, GOOD, **given)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert served.ask("/metrics", **given)[0] == 401
        assert served.ask(TEXT, GOOD, Authorization="Bearer sésame".encode())[0] == 200
        assert (served.ask("/health")[0], served.ask("/")[0]) == (200, 200)
    finally:
        config.loaded_app = before


def test_the_openai_client_raises_its_own_errors(served):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.completions.create(model="gpt-4", prompt=PROMPT)
        with pytest.raises(openai.BadRequestError, match="n=2: not built") as found:
            client.completions.create(model="student", prompt=PROMPT, n=2)
        assert (found.value.param, found.value.code) == ("n", "unsupported_parameter")
