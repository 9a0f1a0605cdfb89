"""The tables at the head of a recipe: written between the marker lines, and nowhere else."""

import importlib.util
from pathlib import Path

import pytest

from jaxhybrid.errors import ConfigError
from jaxhybrid.settings.stages import STAGES

ROOT = Path(__file__).parents[2]
GIVEN = {"parameters": 2**30, "optimizer": 2**31, "teacher": 0, "batch": 0}
FIGURES = {
    "mesh": {"data": 1, "fsdp": 32, "tensor": 1, "context": 2}, "given": GIVEN, "held": 0, "exchanges": [],
    "compiled": {"memory": {"peak_memory": 5 * 2**30}}, "flops": {"products": 1e15}, "moved": 1e12,
}  # fmt: skip


@pytest.fixture
def recipe_plans(monkeypatch):
    spec = importlib.util.spec_from_file_location("recipe_plans", ROOT / "benchmarks" / "recipe_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Steps:
        def __init__(self, *given):
            pass

        def figures(self, planned, stages):
            return dict.fromkeys(stages, FIGURES)

    monkeypatch.setattr(module, "Steps", Steps)
    monkeypatch.chdir(ROOT)
    return module


def test_tables_stand_between_the_markers(recipe_plans):
    path = Path("configs/qwen2.5-3b-instruct.yaml")
    text = path.read_text()
    found = recipe_plans.planned_text(path, text, jobs=1)
    before, _, after = text.partition("# plan: begin\n")
    assert found.startswith(before)
    assert found.endswith(after.partition("# plan: end\n")[2])
    table = found[len(before) :].partition("# plan: end")[0]
    assert all(f"\n# | {stage} " in table for stage in STAGES)
    assert "of 95.73" in table  # the launch line's slice
    assert recipe_plans.planned_text(path, found, jobs=1) == found


def test_a_recipe_without_markers_is_refused(recipe_plans):
    with pytest.raises(ConfigError, match="lacks the lines `# plan: begin`"):
        recipe_plans.planned_text(Path("x.yaml"), "name: x\n# --topology v5p:4x4x4\n", jobs=1)
