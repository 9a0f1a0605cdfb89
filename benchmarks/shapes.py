"""The sizes of models, for programs that need no weights: configs/teachers, read as runs read a teacher's."""

from argparse import ArgumentParser
from pathlib import Path

from jaxhybrid.errors import JaxHybridError
from jaxhybrid.families import hf_to_config
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.weights.safetensors import read_table

TEACHERS = Path(__file__).parents[1] / "configs" / "teachers"
SHAPES = sorted(folder.name for folder in TEACHERS.iterdir())


def shape_of(name: str) -> ModelConfig:
    """Of one of SHAPES, or of a folder with a config.json."""
    return hf_to_config(read_table((TEACHERS / name if name in SHAPES else Path(name)) / "config.json"))


def asked_shape(parser: ArgumentParser, name: str) -> ModelConfig:
    """What --shape asks for; ends with the parser's error if it is none."""
    try:
        return shape_of(name)
    except JaxHybridError as error:
        parser.error(f"--shape {name}: {error} There are {', '.join(SHAPES)}.")


def quarter(depth: int) -> tuple[int, ...]:
    """A quarter of the layers, evenly: what a hybrid keeps as softmax here."""
    return tuple(range(3, depth, 4))
