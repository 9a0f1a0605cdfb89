"""The recipes in configs/: they launch on the slice they are made for, and the figures at their heads are right."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from jaxhybrid.disk import DiskPlan, total
from jaxhybrid.families import hf_to_config
from jaxhybrid.launch.job import cloud_job
from jaxhybrid.launch.slices import find_slice
from jaxhybrid.model.blueprint import count_parameters
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"
H100, V5P = 400e12, 0.4 * 459e12  # floating-point operations a second at 40 % of the peak
RECIPES = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if "jaxhybrid launch" in path.read_text()]


def teacher_of(name):
    return hf_to_config(json.loads((CONFIGS / "teachers" / name / "config.json").read_text()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_slice_that_its_head_launches(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    (command,) = re.findall(r"^#\s+jaxhybrid (launch .*)$", text, re.MULTILINE)
    arguments = shlex.split(command)
    where = find_slice(arguments[arguments.index("--topology") + 1])
    config, teacher = load_config(CONFIGS / f"{name}.yaml"), teacher_of(name)
    cloud_job(config, where, 1, image="host/jaxhybrid", bucket="runs", nfs=None, zone="us-east5-a", spot=False)

    # What the mesh divides: the width over fsdp x context, heads, MLP and vocabulary over tensor.
    shards, tensor = where.devices // config.mesh.tensor, config.mesh.tensor
    assert teacher.hidden_size % shards == 0
    assert not any(size % tensor for size in (teacher.num_heads, teacher.intermediate_size, teacher.vocab_size))
    assert teacher.num_kv_heads % tensor == 0 or tensor % teacher.num_kv_heads == 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_figures_at_the_head_are_those_of_docs_recipes(name):
    config, teacher = load_config(CONFIGS / f"{name}.yaml"), teacher_of(name)
    mixer = GatedDeltaNetConfig().resolve(teacher)
    linear = replace(teacher, layer_types=(GatedDeltaNetConfig.kind,) * teacher.num_layers, mixer=mixer)
    disk = DiskPlan(config, linear)
    layers, kept = teacher.num_layers, layers_in_budget(config.select.budget, teacher.num_layers)
    frozen, student = (count_parameters(model_variables(model)) for model in (teacher, linear))
    operations = {
        "align": config.align.tokens * (2 * frozen + 6 * disk.mixers),
        "score": layers * config.score.tokens * 8 * student,
        "greedy": (layers * kept - kept * (kept - 1) // 2) * config.select.measure.tokens * 2 * student,
        "distill": config.distill.tokens * (8 * student + 2 * frozen),
        "finetune": config.finetune.tokens * 8 * student,
    }
    full_score = operations["score"]
    del operations["greedy" if config.select.method == "kl_guided" else "score"]
    text = " ".join((CONFIGS / f"{name}.yaml").read_text().replace("\n#", " ").split())

    assert figure(text, r"not measured: ([\d.e]+) floating-point") == pytest.approx(all_of(operations), rel=0.05)
    assert figure(text, r"(\d+) hours of one H100") == pytest.approx(all_of(operations) / H100 / 3600, rel=0.05)
    assert figure(text, r"or (\d+) chip hours of v5p") == pytest.approx(all_of(operations) / V5P / 3600, rel=0.05)
    stages = [stage for stage in (*STAGES, "export") if stage in operations or stage == "export"]
    most, needs = disk.most(stages)
    assert figure(text, rf"Disk: ([\d.]+) TB while it {most.removesuffix('e')}") == pytest.approx(
        total(needs) / 1e12, rel=0.05
    )
    if "score" not in operations:
        assert figure(text, r"take ([\d.e]+) operations more") == pytest.approx(full_score, rel=0.05)
        assert figure(text, r"more, ([\d,]+) chip hours") == pytest.approx(full_score / V5P / 3600, rel=0.05)
        scored = total(disk.needs("score"))
        assert figure(text, r"and ([\d.]+) TB of disk") == pytest.approx(scored / 1e12, rel=0.05)
        checkpoint = (
            count_parameters(model_variables(linear.with_layers((FULL_ATTENTION,) * kept + linear.layer_types[kept:])))
            * 12
        )
        number, unit = re.search(r"A checkpoint is (\d+) (GB|TB)", text).groups()
        assert float(number) * {"GB": 1e9, "TB": 1e12}[unit] == pytest.approx(checkpoint, rel=0.05)
    else:
        assert operations["score"] / all_of(operations) == pytest.approx(0.9, abs=0.05)


def all_of(operations):
    return sum(operations.values())


def figure(text, pattern):
    (number,) = re.findall(pattern, text)
    return float(number.replace(",", ""))
