"""Reads a run's settings: a YAML file, `key=value` over it, checked against the typed tree of `run.py`.

    config = load_config("configs/demo.yaml", ["seed=1", "distill.tokens=2_000_000"])

Unknown keys are refused with the nearest known one, wrong values with the key, the value and what would do.
"""

import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxhybrid.errors import ConfigError
from jaxhybrid.settings.fields import fields, section_of
from jaxhybrid.settings.run import RunConfig


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in the file `path` with each `a.b=value` of `overrides` (value in YAML; empty is null) laid over it.

    Raises ConfigError (TopologyError for a mesh axis that is not built yet).
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read config {os.fspath(path)!r}: {error}") from error
    tree = _parse_yaml(text, f"config {os.fspath(path)!r}")
    if not isinstance(tree, dict):
        raise ConfigError(f"Config {os.fspath(path)!r} is a {type(tree).__name__}, not `key: value` lines.")
    for override in overrides:
        _lay_over(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """The typed settings of a nested dict, every default filled in. Raises ConfigError listing all that is wrong."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(error.errors()))) from error


def to_yaml(config: RunConfig) -> str:
    """Every setting, defaults included; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# --- YAML and overrides -----------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose keys may not repeat and in which 1e-3 is a number, as in YAML 1.2 and Python."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Cannot read {where}: {' '.join(str(error).split())}") from error


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, leaf = key.strip().split(".")
    if not equals or not leaf or not all(parents):
        raise ConfigError(f"Override {override!r} is not of the form key=value, for example distill.tokens=1_000_000.")
    # A glob may begin with a sign that YAML keeps for itself.
    value = text if text.startswith(("*", "?", "!", "@", "%")) else _parse_yaml(text, f"override {override!r}")
    for index, name in enumerate(parents):
        child = tree.get(name)
        if not isinstance(child, dict | None):
            raise ConfigError(f"Override {override!r}: {'.'.join(parents[: index + 1])} is {child!r}, not a section.")
        own = dict(child or {})  # through an alias of YAML another section may be the same dict
        tree[name] = own
        tree = own
    tree[leaf] = value


# --- messages ---------------------------------------------------------------------------------------------------------


def _messages(errors: Sequence[ErrorDetails]) -> list[str]:
    """One line per key; the members of a union, which pydantic reports one by one, are joined."""
    lines: dict[str, str] = {}
    for error in errors:
        key, kind, value = _dotted(error["loc"]), error["type"], error.get("input")
        expected = error["msg"].replace("Input should be", "it should be").replace("valid tuple", "list")
        if kind == "extra_forbidden":
            lines[key] = f"Unknown setting {key!r}.{_nearest(key)}"
        elif kind == "missing":
            lines[key] = f"{key} must be given{_described(key)}."
        elif kind == "value_error":
            lines[key] = f"{key}: {error['ctx']['error']}.".removeprefix(": ")
        elif kind in ("model_type", "model_attributes_type"):
            lines[key] = f"{key} is {value!r}, not a section of `key: value` lines."
        elif key in lines:
            lines[key] = f"{lines[key].removesuffix('.')}; or {expected}."
        else:
            lines[key] = f"{key} is {value!r} ({type(value).__name__}); {expected}."
    return list(lines.values())


def _dotted(loc: tuple[int | str, ...]) -> str:
    """A pydantic error's place as a dotted key; without the union members' names that pydantic puts at its end."""
    model: type[BaseModel] | None = RunConfig
    parts = ""
    for part in loc:
        if isinstance(part, int):
            parts += f"[{part}]"
        elif model is not None:
            parts += f".{part}" if parts else part
            model = section_of(model.model_fields[part]) if part in model.model_fields else None
    return parts


def _nearest(key: str) -> str:
    known = [name for name, _ in fields(RunConfig)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # right word, wrong or missing section
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.7)]
    return f" Did you mean {close[0]!r}?" if close else " `jaxhybrid settings` lists every setting."


def _described(key: str) -> str:
    return next((f": {field.description}" for name, field in fields(RunConfig) if name == key), "")
