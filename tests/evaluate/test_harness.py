"""lm-evaluation-harness on our models: the figures of its own model for transformers, and whole tasks from files."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

from jaxhybrid.cli import main
from jaxhybrid.complete import open_model
from jaxhybrid.decoding.generate import generate
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate.harness import HarnessModel, run_tasks
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import forward
from tests.tiny import write_teacher, write_tokenizer

QUESTIONS = [
    {"question": "anna likes the", "choices": [" lime", " trebs", " anna dora"], "answer": 1},
    {"question": "", "choices": ["carl", "bert has"], "answer": 0},
    {"question": "the number 37 and likes the number 74," * 8, "choices": [" emil", " d"], "answer": 0},
]
TASKS = {
    "choose": """
task: choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "read": """
task: read
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, weight_by_size: true}]
""",
    "write": """
task: write
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{reply}}"
generation_kwargs: {until: ["<stop>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
TEXTS = ["anna has the number 0 and likes the anna. " * 30, "dora likes the number 111."]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def opened(teacher_folder):
    return open_model(str(teacher_folder))


@pytest.fixture
def harness(opened):
    return HarnessModel(*opened, batch_size=2)


@pytest.fixture
def task_folder(tmp_path, opened, monkeypatch):
    """Three tasks in files. The right reply of the last is what the model says to one of its two questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, vocabulary, ends = opened
    tokenizer = vocabulary.tokenizer
    replies = [tokenizer.decode(generate(model, [tokenizer("anna likes").input_ids], 4, eos_ids=ends)[0]), "no"]
    rows = {
        "choose": QUESTIONS,
        "read": [{"text": text} for text in TEXTS],
        "write": [{"question": "anna likes", "reply": reply} for reply in replies],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(settings + "".join(f"{k}: {json.dumps(v)}\n" for k, v in source.items()))
    return folder


def likelihood(opened, context, continuation):
    """By a forward pass over exactly these tokens, cut on the left to the context the model has."""
    model, _, _ = opened
    tokens = [*context, *continuation][-(model.config.max_position_embeddings + 1) :]
    log_p = np.asarray(jax.nn.log_softmax(forward(model, jnp.asarray([tokens[:-1]]))[0]))
    log_p = log_p[len(tokens) - 1 - len(continuation) :]
    return log_p[np.arange(len(continuation)), continuation].sum(), bool((log_p.argmax(-1) == continuation).all())


def encoded(tokenizer, context, continuation):
    """Tokens of both, as the running text has them; an empty context is the end token."""
    before = tokenizer(context).input_ids
    return before or [tokenizer.eos_token_id], tokenizer(context + continuation).input_ids[len(before) :]


def request(*arguments):
    return SimpleNamespace(args=arguments)


# --- against the harness's own model for transformers, on the same folder

# What the tokenizer makes of a text by itself (None: it knows no BOS), and what is asked of both models.
BEGINNINGS = [(None, None), ("$A", True), ("<begin> $A", None), ("<begin> $A", False)]


def with_tokenizer(teacher_folder, folder, form):
    shutil.copytree(teacher_folder, folder)
    write_tokenizer(folder, form)
    return str(folder)


@pytest.fixture(scope="module", params=BEGINNINGS, ids=str)
def both(request, teacher_folder, tmp_path_factory):
    """Our model under the harness, and transformers' under its own class."""
    form, asked = request.param
    folder = with_tokenizer(teacher_folder, tmp_path_factory.mktemp("both") / "teacher", form)
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, add_bos_token=asked)
    return HarnessModel(*open_model(folder, asked), batch_size=2), theirs


def test_likelihoods_are_those_of_transformers(both):
    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    pairs += [("<begin>anna likes", " the"), ("", "<begin>anna"), ("<end>anna", " likes"), ("anna ", "likes")]
    pairs = [request(*pair) for pair in pairs]
    found, expected = (model.loglikelihood(pairs, disable_tqdm=True) for model in both)
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=2e-4)
    assert [same for _, same in found] == [same for _, same in expected]


def test_likelihoods_of_whole_texts_are_those_of_transformers(both):
    texts = [request(text) for text in (*TEXTS, "<begin>anna")]
    assert len(both[0].tok_encode(TEXTS[0])) > 2 * both[0].max_length  # several windows
    found, expected = (model.loglikelihood_rolling(texts, disable_tqdm=True) for model in both)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_replies_are_those_of_transformers(both):
    wanted = {"until": ["xyz"], "max_gen_toks": 6}
    prompts = [request(text, wanted) for text in ("anna likes", TEXTS[0], "<begin>bert", "bert")]
    found, expected = (model.generate_until(prompts, disable_tqdm=True) for model in both)
    assert found == expected
    assert len(set(found)) > 1


def test_what_a_tokenizer_puts_after_a_text_is_not_put_after_a_prompt(teacher_folder, tmp_path):
    ours, plain = (
        HarnessModel(*open_model(with_tokenizer(teacher_folder, tmp_path / name, form)))
        for name, form in (("ends", "<begin> $A <end>"), ("plain", "<begin> $A"))
    )
    assert ours.tokenizer("anna").input_ids[-1] == ours.tokenizer.eos_token_id
    assert ours.tok_encode("anna") == plain.tok_encode("anna")
    assert ours._encode_pair("anna", " likes") == plain._encode_pair("anna", " likes")


def test_greedy_is_told_from_not_greedy(opened, harness):
    model, vocabulary, _ = opened
    prompt = vocabulary.prompt("anna likes")
    greedy = generate(model, [prompt], 9)[0]
    other = [*greedy[:8], (greedy[8] + 1) % 300]
    ((first, same), (_, differs)) = harness._loglikelihood_tokens([(None, prompt, t) for t in (greedy, other)], True)
    assert (same, differs) == (True, False)
    np.testing.assert_allclose(first, likelihood(opened, prompt, greedy)[0], atol=1e-4)


def test_text_ends_at_a_stop_and_is_that_of_each_prompt_alone(opened, harness):
    model, vocabulary, ends = opened
    tokenizer = vocabulary.tokenizer
    prompts = ["anna likes", "the number of the " * 40, "bert"]
    room = model.config.max_position_embeddings - 6
    free = [tokenizer.decode(generate(model, [tokenizer(p).input_ids[-room:]], 6, eos_ids=ends)[0]) for p in prompts]
    stop = free[0][2:4]
    found = harness.generate_until([request(p, {"until": [stop], "max_gen_toks": 6}) for p in prompts], True)
    assert found == [text.split(stop)[0] for text in free]
    with pytest.raises(ConfigError, match=r"temperature 0\.7"):
        harness.generate_until([request("a", {"do_sample": True, "temperature": 0.7})], True)
    with pytest.raises(ConfigError, match="128 new tokens; the context has 128"):
        harness.generate_until([request("a", {"max_gen_toks": 128})], True)
    with pytest.raises(DataError, match="continuation of 0 tokens"):
        harness.loglikelihood([request("a", "")], True)


def test_whole_tasks_on_several_devices(opened, task_folder):
    model, vocabulary, _ = opened
    tokenizer, mesh = vocabulary.tokenizer, make_mesh(2, 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = open_model(model.folder, mesh=mesh)
        found = run_tasks(*spread, list(TASKS), task_folder=task_folder, batch_size=2)
    right = 0
    for q in QUESTIONS:
        scores = [likelihood(opened, *encoded(tokenizer, q["question"], choice))[0] for choice in q["choices"]]
        right += int(np.argmax(scores) == q["answer"])
    assert found["choose"]["acc"] == pytest.approx(right / 3)
    assert found["write"]["exact_match"] == 0.5
    harness = HarnessModel(*opened)
    total = sum(harness.loglikelihood_rolling([request(text) for text in TEXTS], True))
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)  # as the harness counts them
    assert found["read"]["word_perplexity"] == pytest.approx(np.exp(-total / words), rel=1e-5)
    assert run_tasks(*opened, ["write"], task_folder=task_folder, limit=1)["write"]["exact_match"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "<begin> $A"])
def test_whole_tasks_of_an_export_are_those_of_transformers(whole, task_folder, tmp_path, form):
    folder = with_tokenizer(whole.run / "export", tmp_path / "export", form)
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, trust_remote_code=True)
    manager = lm_eval.tasks.TaskManager(include_path=str(task_folder), include_defaults=False)
    asked = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0, "log_samples": False}
    expected = lm_eval.simple_evaluate(model=theirs, **asked)["results"]
    found = run_tasks(*open_model(folder), list(TASKS), task_folder=task_folder, batch_size=2)
    for task, figure in (("choose", "acc"), ("read", "word_perplexity"), ("write", "exact_match")):
        assert found[task][figure] == pytest.approx(expected[task][f"{figure},none"], rel=1e-4), task


def test_a_context_that_is_too_long_is_refused_where_none_is_cut(opened):
    model, vocabulary, ends = opened
    harness = HarnessModel(model, vocabulary, ends, cut=False)
    with pytest.raises(DataError, match=r"a text of \d+ tokens, and the model's context has room for 122"):
        harness.generate_until([request("anna likes " * 100, {"until": ["x"], "max_gen_toks": 6})], True)
    with pytest.raises(DataError, match=r"a text of \d+ tokens, and the model's context has room for 129"):
        harness.loglikelihood([request("anna likes " * 100, "x")], True)


def test_the_command(opened, task_folder, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxhybrid", "benchmark", opened[0].folder, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    output = tmp_path / "figures.json"
    assert not command("write", "--task-folder", task_folder, "--output", output)
    printed = capsys.readouterr().out
    assert "texts begin with no special token" in printed
    assert "exact_match                  0.5000" in printed
    assert json.loads(output.read_text())["write"]["exact_match"] == 0.5
    for arguments, message in (
        (["wrote", "--task-folder", task_folder], "does not know the task 'wrote'"),
        (["write", "--task-folder", task_folder, "--limit", "0"], "limit 0: at least 1"),
        (["write", "--task-folder", task_folder, "--dtype", "int8"], "dtype 'int8'"),
        (["write", "--task-folder", task_folder, "--prepend-bos"], "has no BOS token"),
    ):
        assert command(*arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jaxhybrid.evaluate.harness")
    assert command("write") == 2
    assert "benchmark needs lm-eval: `uv sync --extra eval`" in capsys.readouterr().err
