"""A whole run with each mixer: all stages, the export, its reading back, and text from it."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxhybrid import complete
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.weights.huggingface import load_student
from tests.runs import Workshop, read, write_text
from tests.test_run import trained
from tests.tiny import stage, write_config, write_teacher

torch.set_num_threads(1)
CALIBRATED = "align.calibrate={sequence_length: 64, batch_size: 8}"
# Beside what tests/test_run.py runs.
RUNS = {
    **{kind: [f"mixer.kind={kind}"] for kind in STUDENT_MIXERS if kind != "gated_deltanet"},
    "calibrated": ["mixer.kind=kimi_delta", CALIBRATED],
}
RUNS["window_attention"] += ["mixer.window=2", "mixer.sinks=1"]  # short: they begin as the teacher
PROMPTS = ["anna likes", "bert sees carl and has the number"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("mixers"))
    teacher, text = write_teacher(workshop.folder / "teacher"), write_text(workshop.folder / "text.jsonl")
    data = {"train": str(text), "heldout_tokens": 2048, "cache_dir": str(workshop.folder / "tokens")}
    write_config(workshop.config, teacher, data=data, align=stage(tokens=8 * 64 * 12))
    return workshop


def of_transformers(folder, prompt):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    return tokenizer.decode(made[inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run(workshop, name):
    run = workshop.folder / name
    told = workshop.finish("run", workshop.config, f"run_dir={run}", *RUNS[name])
    align, evaluation = read(run / "align" / "done.json"), read(run / "evaluation.json")
    assert align["heldout_loss_after"] < align["heldout_loss_before"]
    assert ("calibration" in align) == ("begins at measured values" in told) == (name == "calibrated")
    assert list(evaluation["models"]) == ["teacher", "distill", "finetune"]
    assert evaluation["models"]["finetune"]["kl"] > 0

    student = load_student(run / "export")
    assert student.config.mixer.kind == RUNS[name][0].removeprefix("mixer.kind=")
    assert student.config.softmax_layers == tuple(read(run / "layers.json")["softmax_layers"])
    assert len(student.config.softmax_layers) == 1
    jax.tree.map(np.testing.assert_array_equal, student.params, trained(run))
    answers = complete.complete(str(run / "export"), PROMPTS, 12)
    assert all(answers)
    assert answers == [of_transformers(run / "export", prompt) for prompt in PROMPTS]
