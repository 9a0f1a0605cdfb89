"""How much disk a run says it will take: against what is written, and against arithmetic for a large model."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.disk import DiskPlan, require, size_text, used_bytes
from jaxhybrid.errors import RunError
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.run_folder import RunFolder
from jaxhybrid.settings.read import load_config
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.optimizer import make_optimizer, start
from tests.tiny import training

LLAMA = ModelConfig(
    family="llama", vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24,
    num_kv_heads=8, head_dim=128, norm_eps=1e-5, max_position_embeddings=131_072, tie_embeddings=True,
)  # fmt: skip
RECIPE = Path(__file__).parent.parent / "configs" / "llama-3.2-3b-instruct.yaml"


def plan(teacher, softmax, *overrides):
    linear = replace(
        teacher,
        layer_types=(GatedDeltaNetConfig.kind,) * teacher.num_layers,
        mixer=GatedDeltaNetConfig().resolve(teacher),
    )
    return DiskPlan(load_config(RECIPE, [f"select.budget={softmax}", *overrides]), linear)


def sizes(needs):
    return {need.what: need.bytes for need in needs}


def test_a_stage_takes_what_is_said(teacher, tmp_path):
    steps = "distill.tokens=131_072_000"  # 1000 steps
    said = sizes(plan(teacher.config, 4, steps).needs("distill"))  # four of four layers
    optimizer = make_optimizer(training(9), teacher.params)
    # Moments of zeros would be compressed away.
    noise = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: x + jnp.asarray(noise.normal(size=x.shape), x.dtype), start(teacher.params, optimizer)
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (500, 1000):
        checkpoints.save(step, state, {"batches": {}}, wait=True)
    checkpoints.close()
    RunFolder(tmp_path).finish("distill", {}, teacher.params)
    written = {"2 checkpoints": tmp_path / "checkpoints", "parameters": tmp_path / "distill" / "params"}
    assert said.keys() == written.keys()
    for what, folder in written.items():
        assert (
            0.9 * said[what] < used_bytes([folder]) < 1.1 * said[what] + 128_000
        )  # in blocks, badly filled by small files


def test_the_disk_of_the_3b_recipe():
    """Sizes by hand: 3.606e9 - 0.793e9 parameters are shared, a linear layer has 4 x 3072 x 3072 + ..."""

    def needs(stage, *overrides):
        return sizes(plan(LLAMA, 7, *overrides).needs(stage))

    embed, mlp, norms = 128_256 * 3072, 3 * 3072 * 8192, 2 * 3072
    softmax = 2 * 3072 * 3072 + 2 * 3072 * 1024
    linear = 5 * 3072 * 3072 + 2 * 3072 * 24 + 2 * 24 + 128  # q, k, v, o, g; a, b; A_log, dt_bias; norm
    shared = embed + 28 * (mlp + norms) + 3072
    candidate, student = shared + 28 * linear + softmax, shared + 21 * linear + 7 * softmax
    states = 3072 * 2 * 4096 * 32
    assert needs("align") == {"3 checkpoints": 3 * 12 * 28 * linear, "parameters": 4 * 28 * linear}
    assert needs("score") == {
        "held-out teacher states": 8 * states,
        "teacher states": 1525 * states,
        "28 waiting candidates": 28 * 12 * candidate,
        "2 checkpoints": 2 * 12 * candidate,
    }
    assert 1.2e12 < 1525 * states < 1.25e12
    assert 1.2e12 < 28 * 12 * candidate < 1.4e12
    less = needs("score", "score.keep_teacher_states=false", "score.kept_dtype=bfloat16")
    assert less == {
        "held-out teacher states": 8 * states,
        "28 waiting candidates": 28 * 6 * candidate,
        "2 checkpoints": 2 * 12 * candidate,
    }
    assert "28 waiting candidates" not in needs("score", "score.stop_when_stable=null")
    assert needs("distill") == {"3 checkpoints": 3 * 12 * student, "parameters": 4 * student}
    assert needs("finetune") == {"1 checkpoint": 12 * student, "parameters": 4 * student}  # of its 63 steps
    assert needs("export") == {"weights": 2 * student}
    one = plan(LLAMA, 7).needs("score", range(3))
    assert sizes(one)["3 waiting candidates"] == 3 * 12 * candidate


def test_what_is_free_decides_and_what_is_there_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxhybrid.disk.free_bytes", lambda path: 2_000_000_000_000)
    needs = plan(LLAMA, 7).needs("score")
    with pytest.raises(RunError) as refused:
        require("score", needs, 0, tmp_path)
    message = str(refused.value)
    assert "score takes up to 2.6" in message
    assert f"2 TB are free at {tmp_path}" in message
    for setting in ("score.keep_teacher_states=false", "score.kept_dtype=bfloat16", "score.heldout_tokens", "run_dir"):
        assert setting in message
    require("score", needs, 700_000_000_000, tmp_path)  # as much is taken by an earlier process of this stage
    assert "score: at most 2.6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (46_300, "46.3 kB"), (1.29e12, "1.29 TB"), (999_900, "1 MB")]
)
def test_sizes_are_read_easily(size, text):
    assert size_text(size) == text
