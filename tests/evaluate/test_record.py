"""The evaluation of a run with everything in it: in the file, the answers kept, the table and the page."""

import json
import shutil

import jax
import pytest

from jaxhybrid.cli import read_settings
from jaxhybrid.complete import open_model
from jaxhybrid.decoding.generate import generate
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate.record import prepare
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.report import evaluation_table, write_report
from jaxhybrid.settings.compare import fingerprint
from jaxhybrid.settings.evaluate import EvaluateConfig
from tests.evaluate.test_recall import letters
from tests.runs import read

MODELS = ["teacher", "distill", "finetune", "finetune, linear off", "finetune, softmax off"]
TASK = """
task: choose
output_type: multiple_choice
dataset_path: json
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [
    {"question": "anna likes", "choices": [" carl", " dora", " emil"], "answer": 1},
    {"question": "bert has the number", "choices": [" 12", " 999"], "answer": 0},
]


@pytest.fixture(scope="module")
def evaluated(whole, tmp_path_factory):
    """(pipeline, what `evaluate` gave) of a copy of the whole run, on two devices. The right completions are those
    that the teacher gives, so that its students are measured."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(whole.run, folder / "run")
    model, vocabulary, ends = open_model(str(whole.folder / "teacher"))
    texts = ["anna likes", "dora has the number", "carl likes carl"]
    prompts = [vocabulary.prompt(text) for text in texts]
    said = [vocabulary.tokenizer.decode(tokens) for tokens in generate(model, prompts, 6, eos_ids=ends)]
    rows = [{"asked": text, "next": reply.split("\n")[0]} for text, reply in zip(texts, said)]
    (folder / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "choose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    files = json.dumps({"data_files": {"test": str(folder / "choose.jsonl")}})
    (folder / "tasks" / "choose.yaml").write_text(f"{TASK}dataset_kwargs: {files}\n")
    settings = [
        "evaluate.ablations=true",
        "evaluate.lengths=[32]",
        "evaluate.completion={sources: [%s], text_field: asked, answer_field: next, new_tokens: 6}"
        % (folder / "next.jsonl"),
        f"evaluate.lm_eval={{tasks: [choose], task_folder: {folder / 'tasks'}}}",
    ]
    with Pipeline(read_settings(folder / "run", settings), devices=jax.devices()[:2]) as pipeline:
        return pipeline, pipeline.evaluate()


@pytest.mark.slow
def test_rows_say_how_their_models_were_made(evaluated):
    pipeline, found = evaluated
    assert list(found["models"]) == MODELS
    tokens = dict(zip(MODELS, (0, 5120 + 5120, 5120 + 5120 + 3072)))
    for name, row in found["models"].items():
        assert row["trained_tokens"] == tokens[name.split(",")[0]], name
        assert row["seed"] == 0
        assert row["config"] == fingerprint(pipeline.config)
        assert row["hardware"] == "2 x cpu"
    assert read(pipeline.folder.path / "evaluation.json")["models"] == found["models"]


@pytest.mark.slow
def test_ablations_and_lengths_are_measured(evaluated, whole):
    _, found = evaluated
    before = read(whole.run / "evaluation.json")["models"]
    for name, row in before.items():
        assert found["models"][name]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-4)
    kls = {name: row["kl"] for name, row in found["models"].items()}
    assert kls["teacher"] == 0
    assert min(kls["finetune, linear off"], kls["finetune, softmax off"]) > 1.01 * kls["finetune"]
    assert [measured["sequence_length"] for measured in found["quality"]] == [64, 32]
    for measured in found["quality"]:
        assert list(measured["models"]) == MODELS
        assert {figures["tokens"] for figures in measured["models"].values()} == {1000}


@pytest.mark.slow
def test_completions_are_scored_and_kept(evaluated):
    pipeline, found = evaluated
    (task,) = found["tasks"]
    assert (task["suite"], task["task"], task["prompts"], task["applies"]) == ("completion", "next", 3, True)
    assert task["models"]["teacher"]["score"]["share"] == 1.0
    assert list(task["models"]) == MODELS
    for name, folder in zip(MODELS, ("teacher", "distill", "finetune", "finetune-linear-off", "finetune-softmax-off")):
        lines = (pipeline.folder.path / "answers" / folder / "next.jsonl").read_text().splitlines()
        scores = [json.loads(line)["score"] for line in lines]
        assert task["models"][name]["score"]["share"] == pytest.approx(sum(scores) / 3)
    head = json.loads((pipeline.folder.path / "prompts" / "next.jsonl").read_text().splitlines()[0])
    assert head["hash"] == task["hash"]


@pytest.mark.slow
def test_lm_eval_runs_on_every_model(evaluated):
    pipeline, found = evaluated
    from jaxhybrid.evaluate.harness import run_tasks

    assert list(found["lm_eval"]) == MODELS
    opened = open_model(str(pipeline.folder.path / "export"))
    folder = pipeline.folder.path.parent / "tasks"
    assert found["lm_eval"]["finetune"] == run_tasks(*opened, ["choose"], task_folder=folder)


@pytest.mark.slow
def test_all_of_it_is_shown(evaluated):
    pipeline, found = evaluated
    table = evaluation_table(found)
    page = write_report(pipeline.folder.path).read_text()
    for shown in ("reverse KL", "same token", "trained on", "13,312", "2 x cpu", fingerprint(pipeline.config)):
        assert shown in table
        assert shown in page
    for name in MODELS:
        assert sum(line.startswith(f"{name}  ") for line in table.splitlines()) == 1
        assert any(line.startswith("next") and f" {name} " in line for line in table.splitlines())
    assert "task of lm-eval" in table
    assert "32 to 63" in page
    figures = {path.stem for path in (pipeline.folder.path / "report").glob("*.png")}
    assert {"positions", "tasks"} <= figures
    assert "depths" not in figures  # completions have none


@pytest.mark.parametrize(
    ("settings", "processes", "error", "message"),
    [
        ({"ruler": {"tasks": ["fwe"]}}, 2, ConfigError, "one process, with all its devices; there are 2"),
        ({"ruler": {"tasks": ["fwe"], "lengths": [2500], "samples": 1}}, 1, ConfigError, "context of 2000"),
        ({"completion": {"sources": ["nowhere.jsonl"]}}, 1, DataError, "Cannot read 'nowhere.jsonl'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(settings, processes, error, message, tmp_path):
    config = EvaluateConfig(**settings | {"recall": {"pairs": []}})
    with pytest.raises(error, match=message):
        prepare(config, letters(), [], 2000, tmp_path, processes)
