"""The sizes of models, for programs that need no weights: configs/teachers, read as runs read a teacher's."""

from pathlib import Path

from jaxhybrid.families import hf_to_config
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.safetensors import read_table

TEACHERS = Path(__file__).parents[1] / "configs" / "teachers"
SHAPES = sorted(folder.name for folder in TEACHERS.iterdir())


def shape_of(name: str) -> ModelConfig:
    """Of one of SHAPES, or of a folder with a config.json."""
    return hf_to_config(read_table((TEACHERS / name if name in SHAPES else Path(name)) / "config.json"))


def quarter(depth: int) -> tuple[int, ...]:
    """A quarter of the layers, evenly: what a hybrid keeps as softmax here."""
    return tuple(range(3, depth, 4))
