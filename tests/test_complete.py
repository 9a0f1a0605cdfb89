"""Prompts in: how they begin, and what ends an answer."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from jaxhybrid import complete
from jaxhybrid.cli import app
from jaxhybrid.data import load_vocabulary
from jaxhybrid.decoding import engine
from jaxhybrid.errors import JaxHybridError
from jaxhybrid.export.folder import export
from jaxhybrid.weights.huggingface import load_teacher
from tests.tiny import write_teacher, write_tokenizer

TEMPLATE = "{% for message in messages %}<begin>{{ message.content }}:{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"), layers=1)


@pytest.mark.parametrize("form", ["$A", "<begin> $A", "<begin> $A <end>"])
def test_prompts_begin_as_the_tokenizer_begins_a_text(form, folder):
    write_tokenizer(folder, form)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    vocabulary = load_vocabulary(str(folder), 320)
    begin, anna = [tokenizer.bos_token_id], tokenizer("anna", add_special_tokens=False).input_ids
    taken = complete.prompt_tokens(vocabulary, ["anna", "<begin>anna"], chat=False)
    assert taken == [begin * form.startswith("<begin>") + anna, begin + anna]
    taken = complete.prompt_tokens(vocabulary, ["anna"], chat=True)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "anna"}], return_dict=False)
    assert taken == [expected] == [begin + tokenizer("anna:", add_special_tokens=False).input_ids]


def theirs(folder, prompt, tokens, **settings):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)[0]
    return tokenizer.decode(made[inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_those_of_transformers_with_the_folders_penalty(folder):
    write_tokenizer(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 1.3, "eos_token_id": 0}))
    prompts = ["anna likes the", "bert"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert complete.complete(str(folder), prompts, 12) == [theirs(folder, prompt, 12) for prompt in prompts]
    free = complete.complete(str(folder), prompts, 12, repetition_penalty=1.0)
    assert free == [theirs(folder, prompt, 12, repetition_penalty=1.0) for prompt in prompts]
    assert free != complete.complete(str(folder), prompts, 12)


def test_an_answer_comes_in_pieces_and_ends_before_a_stop_string(folder, monkeypatch):
    write_tokenizer(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    monkeypatch.setattr(engine, "STEPS", (3, 3))
    pieces = {0: [], 1: []}
    whole = complete.complete(
        str(folder), ["anna likes the", "bert"], 12, on_text=lambda number, piece: pieces[number].append(piece)
    )
    assert ["".join(pieces[0]), "".join(pieces[1])] == whole
    assert len(pieces[0]) == 4
    stop = whole[0][4:7]
    pieces = {0: [], 1: []}
    cut = complete.complete(
        str(folder), ["anna likes the"], 12, stop=["never", stop], on_text=lambda n, piece: pieces[n].append(piece)
    )
    assert cut == [whole[0][: whole[0].index(stop)]] == ["".join(pieces[0])]
    assert len(pieces[0]) < 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "dtype=float16: use float32 or bfloat16"),
        ({"stop": [""]}, "stop string is empty"),
        ({"tensor": 99}, "tensor=99: there are 8 devices"),
        ({"top_k": -2}, "top_k=-2"),
        ({"chat": True}, "has no chat template; leave --chat out"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, message, folder):
    write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(JaxHybridError, match=message):
        complete.complete(str(folder), ["anna"], **settings)


def test_the_command_prints_one_answer_as_it_comes_and_several_together(folder):
    write_tokenizer(folder)
    one, other = complete.complete(str(folder), ["anna likes the", "bert"], 6, temperature=1.0, seed=4)
    arguments = ["generate", str(folder), "--max-new-tokens", "6", "--temperature", "1"]
    run = CliRunner().invoke(app, [*arguments, "--seed", "4", "anna likes the", "bert"])
    assert run.stdout == f"{one}\n{other}\n"
    assert CliRunner().invoke(app, [*arguments, "--seed", "5", "bert"]).stdout == f"{other}\n"


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
    assert sorted(id for id in listed if id is not None) == complete.end_ids(folder, None) == expected
    assert complete.end_ids(folder, 5) == sorted({5, *expected})


def test_settings_that_change_greedy_text_in_transformers_are_named(folder):
    """Qwen2.5-Instruct has a repetition_penalty of 1.05 to 1.1."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "top_k": 20}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        complete.open_model(str(folder))
    path.write_text(json.dumps({"repetition_penalty": 1.05, "suppress_tokens": [3], "top_k": 20}))
    with pytest.warns(UserWarning, match=r"repetition_penalty=1\.05, suppress_tokens=\[3\].*not built"):
        complete.open_model(str(folder))


def test_a_padding_token_beyond_the_embedding_goes_through_export_and_generate(folder, tmp_path):
    """Llama 2 with a <pad> that has no row."""
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"t{i}" for i in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == rows
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": rows, "eos_token_id": 0}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": rows}))

    exported = export(load_teacher(folder), tmp_path / "export", "float32")
    with pytest.warns(UserWarning, match=rf"'<pad>' \(id {rows}\)"):
        answers = complete.complete(str(exported), ["anna likes the", "<pad>"], 4)
    theirs = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    inputs = tokenizer("anna likes the", return_tensors="pt")
    tokens = theirs.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert answers[0] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert torch.isin(tokens, torch.arange(rows)).all()
