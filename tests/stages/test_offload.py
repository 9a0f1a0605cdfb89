"""What lies in the host's memory changes no number, and is not on the devices between updates."""

import json
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import (
    HOST_MEMORY,
    batch_sharding,
    in_memory,
    make_mesh,
    may_offload,
    param_shardings,
)
from jaxhybrid.model.transformer import Model, model_variables
from jaxhybrid.settings.stages import STAGES, ScoreConfig
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.train.metrics import read_metrics
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.runs import INTERRUPT, Workshop
from tests.tiny import training

MIXER = GatedDeltaNetConfig(conv_size=3)
LINEAR = (MIXER.kind,) * 4
HYBRID = (MIXER.kind, FULL_ATTENTION, MIXER.kind, MIXER.kind)
EVERYTHING = ("moments", "masters", "teacher")


def trained(stage, offload, remat, parts):
    """The state after two updates on eight devices, and the losses."""
    teacher, mesh = (
        make_teacher(vocab_size=60, tie_embeddings=stage == "distill"),
        make_mesh(fsdp=2, tensor=2, context=2),
    )
    student = convert(teacher, LINEAR if stage == "align" else HYBRID, MIXER, jax.random.key(1))
    params = linear_mixers(student.params) if stage == "align" else student.params
    declared = model_variables(student.config)
    declared = linear_mixers(declared) if stage == "align" else declared
    given = {"config": student.config, "dtype": jnp.bfloat16} | ({} if stage == "align" else {"remat": remat})
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(declared, mesh))
        frozen = Model(jax.device_put(teacher.params, param_shardings(teacher.declared, mesh)), teacher.config)
        frozen = in_memory(HOST_MEMORY if "teacher" in offload else "device", frozen)
        optimizer = make_optimizer(training(10, learning_rate=1e-2, mixer_learning_rate=1e-2, offload=offload), params)
        state = jax.jit(partial(start, optimizer=optimizer, offload=offload))(params)
        batch = make_batch(60, batch=2 * parts)
        if parts > 1:
            batch = jax.tree.map(lambda x: x.reshape(parts, 2, -1), batch)
        batch = jax.device_put(batch, batch_sharding(mesh, leading=parts - 1))
        step = {"align": align_step, "distill": distill_step, "finetune": finetune_step}[stage]
        arguments = (batch,) if stage == "finetune" else (frozen, batch)
        compiled, losses = jax.jit(partial(step, optimizer=optimizer, **given), donate_argnums=0), []
        for _ in range(2):
            state, metrics = compiled(state, *arguments)
            losses.append(float(metrics["loss"]))
    assert compiled._cache_size() == 1  # the state comes out as it went in
    return state, losses


def kinds(tree, which):
    """Of the memory in which arrays lie."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if which(x)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "remat", "parts"),
    [
        ("align", None, 1), ("align", None, 2), ("distill", "block", 2), ("distill", "mlp", 2),
        ("finetune", "none", 1), ("finetune", "dots", 1), ("finetune", "block", 1),
    ],
)  # fmt: skip
def test_offloading_changes_nothing(stage, remat, parts):
    expected, losses = trained(stage, (), remat, parts)
    state, offloaded_losses = trained(stage, EVERYTHING, remat, parts)
    assert offloaded_losses == losses
    assert losses[1] != losses[0]
    for kept, offloaded in zip(*map(jax.tree.leaves, (expected, state)), strict=True):
        np.testing.assert_array_equal(kept, offloaded)
        assert kept.sharding.memory_kind == "device"
    assert kinds(state.optimizer, lambda x: x.ndim > 0) == kinds(state.params, may_offload) == {HOST_MEMORY}
    assert kinds(state.params, lambda x: not may_offload(x)) <= {"device"}


def test_candidates_are_the_teachers_own_arrays():
    with pytest.raises(ValueError, match="offload teacher"):
        ScoreConfig(offload=("teacher",))


@pytest.mark.slow
def test_a_whole_run_is_the_same(tmp_path):
    """A run that is cut in the middle of distillation and goes on, everything offloaded, against one with nothing."""
    metrics = {}
    for name, state in {"plain": [], "offloaded": ["moments", "masters"]}.items():
        (tmp_path / name).mkdir()
        workshop = Workshop(tmp_path / name)
        workshop.prepare()
        teacher = state and ["teacher"]
        settings = {"align": state + teacher, "score": state, "distill": state + teacher, "finetune": state}
        arguments = [f"{stage}.offload={json.dumps(offloaded)}" for stage, offloaded in settings.items()]
        cut = INTERRUPT.format(label="distill", step=5, delay=0, number=int(signal.SIGKILL))
        assert workshop.start("run", workshop.config, *arguments, before=cut).returncode < 0
        ended = workshop.start("run", workshop.config, *arguments)
        assert ended.returncode == 0, ended.stderr
        metrics[name] = [
            [(record["step"], record.get("loss")) for record in read_metrics(workshop.run / stage)] for stage in STAGES
        ]
        models = json.loads((workshop.run / "evaluation.json").read_text())["models"]
        metrics[name].append({model: (figures["perplexity"], figures["kl"]) for model, figures in models.items()})
    assert metrics["offloaded"] == metrics["plain"]
