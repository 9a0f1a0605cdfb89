"""Steps of a tiny model compiled for a TPU slice, through the cache."""

import json
import time

import pytest

from jaxhybrid.plan.memory import Memory
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.steps import Steps
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.read import load_config
from tests.tiny import stage, write_config
from tests.tpu import needs_libtpu

KEYS = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.slow
@needs_libtpu
def test_a_step_is_compiled_once_and_fits_as_the_compiler_says(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(KEYS))
    align = stage(sequence_length=256, tokens=8 * 256 * 6)
    path = write_config(tmp_path / "config.yaml", tmp_path / "teacher", dtype="bfloat16", align=align)
    topology, told = Topology.parse("v5e:2x2"), []
    steps = Steps(topology, tmp_path / "plans", 1, told.append)
    (first,) = steps.figures(Planned(load_config(path)), ["align"]).values()
    memory = Memory.of(first, topology)
    assert memory.fits
    assert memory.all * 2**30 == first["compiled"]["memory"]["peak_memory"]
    assert first["flops"]["linear attention"] > 0  # the kernels are in the program
    assert first["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    parts = {part["kind"]: part for part in first["exchanges"]}
    assert all((part["axes"], part["side"]) == (["fsdp"], 2) for part in parts.values())
    assert len(parts) == len(first["exchanges"])
    # Two layers each: q, k, v, g and o, a and b of the mixer; of the teacher q and o, k and v, the MLP and two norms.
    mixers = 2 * (5 * 256 * 256 + 2 * 256 * 2)
    teacher = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512 + 2 * 256)
    tokens = 8 * 256
    # A device has a quarter of everything. Weights in bfloat16, tokens as int32, gradients in float32.
    assert parts["gather"]["received"] == 3 / 4 * (2 * (mixers + teacher) + 4 * tokens)
    assert parts["scatter"]["received"] == 3 / 4 * 4 * mixers
    # Of the embedding, whose width is split, each device gets its own rows' tokens whole.
    assert parts["exchange"]["received"] == 3 / 4 * 2 * 256 * tokens / 4
    assert len(list((tmp_path / "plans").glob("*.json"))) == 1

    began = time.perf_counter()
    assert steps.figures(Planned(load_config(path)), ["align"]) == {"align": first}
    assert time.perf_counter() - began < 3
    # A learning rate is no other program: it is traced, and not compiled.
    other = steps.figures(Planned(load_config(path, ["align.learning_rate=3e-4"])), ["align"])["align"]
    assert other["compiled"] == first["compiled"]
    assert len(list((tmp_path / "plans").glob("*.json"))) == 1
