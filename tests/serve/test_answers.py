"""Answers through the API are those of `generate`, whole and in pieces, alone and beside others."""

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from jaxhybrid.complete import chat_tokens
from tests.serve.conftest import PROMPT, generated, wait_until


def outcomes(served):
    """How many requests have ended how."""
    names = ("answered", "cancelled", "timeout", "failed")
    return {name: served.metric("jaxhybrid_requests", model="student", outcome=name) for name in names}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_is_what_generate_gives(served, alone, vocabulary):
    status, headers, found = served.complete()
    assert (status, headers["content-type"]) == (200, "application/json")
    assert found["choices"] == [{"index": 0, "text": alone, "logprobs": None, "finish_reason": "length"}]
    prompt = vocabulary.prompt(PROMPT)
    assert found["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12
    }  # fmt: skip
    assert (found["object"], found["model"]) == ("text_completion", "student")
    assert found["timings"]["tokens_per_second"] > 0
    assert served.complete(prompt)[2]["choices"][0]["text"] == alone  # as tokens
    assert served.complete([PROMPT], temperature=0.0)[2]["choices"][0]["text"] == alone


def test_drawn_answers_follow_the_seed_and_the_engines_settings(served, student):
    settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
    (expected,) = generated(student, PROMPT, **settings)
    assert [served.complete(**settings)[2]["choices"][0]["text"] for _ in range(2)] == [expected] * 2
    others = {served.complete(temperature=5.0)[2]["choices"][0]["text"] for _ in range(3)}
    assert len(others) == 3  # without a seed each is drawn anew


def test_more_requests_than_slots_are_answered_together_each_as_alone(served, student):
    prompts = [f"{name} has the number {number}" for number, name in enumerate(["anna", "bert", "carl"])]
    expected = [generated(student, prompt, tokens=30)[0] for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: served.complete(prompt, max_tokens=30), prompts))
    assert [answer["choices"][0]["text"] for _, _, answer in found] == expected


def test_the_openai_client_gets_whole_texts_and_streams(client, alone, student):
    assert [model.id for model in client.models.list()] == ["student", "other"]
    assert client.models.retrieve("other").id == "other"
    whole = client.completions.create(model="student", prompt=PROMPT, max_tokens=12, temperature=0)
    assert whole.choices[0].text == alone
    settings = {"max_tokens": 12, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = client.completions.create(model="student", prompt=PROMPT, **settings)
    assert "".join(piece.choices[0].text for piece in pieces) == alone
    assert [piece.choices[0].finish_reason for piece in pieces][-2:] == [None, "length"]
    assert len(pieces) > 2
    assert (last.choices, last.usage.completion_tokens) == ([], 12)


def test_the_openai_client_chats_with_both_models(client, vocabulary, student, other):
    messages = [
        {"role": "user", "content": "anna"},
        {"role": "assistant", "content": "likes"},
        {"role": "user", "content": [{"type": "text", "text": "bert"}, {"type": "text", "text": " and"}]},
    ]
    text = "u:anna\na:likes\nu:bert and\na:"
    flat = [*messages[:2], {"role": "user", "content": "bert and"}]
    assert chat_tokens(vocabulary, flat) == vocabulary.prompt(text)
    for name, folder in (("student", student), ("other", other)):
        (expected,) = generated(folder, text)
        settings = {"model": name, "messages": messages, "max_completion_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**settings)
        assert (whole.choices[0].message.content, whole.choices[0].message.role) == (expected, "assistant")
        pieces = list(client.chat.completions.create(**settings, stream=True))
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        assert pieces[-1].choices[0].finish_reason == "length"


def test_a_chat_goes_on_with_what_the_client_was_given(client):
    messages = [{"role": "user", "content": "anna"}]
    first = client.chat.completions.create(model="student", messages=messages, max_tokens=4)
    messages += [first.choices[0].message, {"role": "user", "content": "bert"}]
    assert client.chat.completions.create(model="student", messages=messages, max_tokens=4).usage.completion_tokens == 4


def test_a_stop_string_ends_an_answer_and_its_slot_is_free_again(served, alone, vocabulary):
    stop = alone[4:7]
    before = outcomes(served)
    found = served.complete(max_tokens=60, stop=["never", stop])[2]
    wait_until(lambda: outcomes(served) == before | {"answered": before["answered"] + 1})
    assert found["choices"][0] | {"logprobs": None} == {
        "index": 0, "text": alone[: alone.index(stop)], "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    count = next(n for n in range(1, 13) if stop in served.complete(max_tokens=n)[2]["choices"][0]["text"])
    assert found["usage"]["completion_tokens"] == count
    events = served.complete(max_tokens=60, stop=stop, stream=True)[2].split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert "".join(piece["text"] for piece in pieces) == alone[: alone.index(stop)]
    assert pieces[-1]["finish_reason"] == "stop"


def test_an_end_token_ends_an_answer(served, monkeypatch, alone, vocabulary):
    pieces = [served.complete(max_tokens=n)[2]["choices"][0]["text"] for n in (1, 2)]
    (end,) = vocabulary.prompt(pieces[1][len(pieces[0]) :])
    model = served.server.batcher.models["student"].model
    monkeypatch.setitem(vars(model), "ends", (end,))
    found = served.complete(max_tokens=60)[2]
    assert found["choices"][0] == {"index": 0, "text": pieces[1], "logprobs": None, "finish_reason": "stop"}
    assert found["usage"]["completion_tokens"] == 2


def test_what_is_counted_can_be_read(served):
    before = {
        name: served.metric(name, model="other") for name in ("jaxhybrid_prompt_tokens", "jaxhybrid_answer_tokens")
    }
    ended = served.metric("jaxhybrid_requests", model="other", outcome="answered")
    found = served.complete(model="other", max_tokens=9)[2]
    assert served.metric("jaxhybrid_answer_tokens", model="other") - before["jaxhybrid_answer_tokens"] == 9
    prompt = served.metric("jaxhybrid_prompt_tokens", model="other") - before["jaxhybrid_prompt_tokens"]
    assert prompt == found["usage"]["prompt_tokens"]
    assert served.metric("jaxhybrid_requests", model="other", outcome="answered") == ended + 1
    assert served.metric("jaxhybrid_tokens_per_second", model="other") >= 0.9
    assert served.metric("jaxhybrid_waiting", model="other") == 0
    assert served.ask("/health")[::2] == (200, {"status": "ok"})
