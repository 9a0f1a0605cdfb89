"""Prompts in: how they begin, and what ends an answer."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxhybrid import text
from tests.tiny import write_teacher, write_tokenizer

TEMPLATE = "{% for message in messages %}<begin>{{ message.content }}:{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"), layers=1)


@pytest.mark.parametrize("form", ["$A", "<begin> $A", "<begin> $A <end>"])
def test_prompts_begin_as_the_tokenizer_begins_a_text(form, folder, monkeypatch):
    write_tokenizer(folder, form)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    begin, anna = [tokenizer.bos_token_id], tokenizer("anna", add_special_tokens=False).input_ids
    taken = []

    def generate(model, prompts, *_, **__):
        taken.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(text, "generate", generate)
    text.complete(str(folder), ["anna", "<begin>anna"])
    assert taken == [begin * form.startswith("<begin>") + anna, begin + anna]
    text.complete(str(folder), ["anna"], chat=True)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "anna"}], return_dict=False)
    assert taken[2] == expected == begin + tokenizer("anna:", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        (None, None, []),
        (None, 7, [7]),
        (None, [7, 2], [2, 7]),
        ([7, 2], 3, [2, 7]),
        (7, [3, 2], [7]),
        ("silent", [3, 2], []),
    ],
)
def test_end_tokens_are_read_where_transformers_reads_them(generation_config, config, expected, folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": config}))
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation_config is not None:
        path.write_text(json.dumps({} if generation_config == "silent" else {"eos_token_id": generation_config}))
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    listed = theirs if isinstance(theirs, list) else [theirs]
    assert sorted(id for id in listed if id is not None) == text.end_ids(folder, None) == expected
    assert text.end_ids(folder, 5) == sorted({5, *expected})
