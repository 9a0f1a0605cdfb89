"""Reads a run's settings: a YAML file, `key=value` over it, checked against the typed tree of `run.py`.

    config = load_config("configs/demo.yaml", ["seed=1", "distill.tokens=2_000_000"])

Unknown keys are refused with the nearest known one, wrong values with the key, the value and what would do.
"""

import difflib
import hashlib
import json
import os
import re
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.settings.budget import check_layers, layers_in_budget
from jaxhybrid.settings.run import RunConfig

__all__ = [
    "UPSTREAM",
    "RunConfig",
    "describe",
    "differences",
    "fingerprint",
    "load_config",
    "parse_config",
    "to_yaml",
    "validate_against",
]

# The sections whose settings a stage's result depends on; selection may use the scores, so what follows does too.
_ALIGN = ("seed", "teacher", "dtype", "mixer", "data", "align")
UPSTREAM: dict[str, tuple[str, ...]] = {
    "align": _ALIGN,
    "score": (*_ALIGN, "score"),
    "select": (*_ALIGN, "score", "select"),
    "distill": (*_ALIGN, "score", "select", "distill"),
    "finetune": (*_ALIGN, "score", "select", "distill", "finetune"),
}


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


def describe() -> str:
    """Every dotted key with its type, default and meaning, one to a line, sections with their heading."""
    lines = []
    for key, field in _fields(RunConfig):
        section = _section(field)
        if section is not None:
            lines.append(f"\n{key}: {(section.__doc__ or '').strip()}")
            continue
        default = "required" if field.is_required() else _shown(field.get_default())
        lines.append(f"  {key}  [{_type_name(field.annotation)} = {default}]\n      {field.description}")
    return "\n".join(lines) + "\n"


def fingerprint(config: RunConfig, sections: Collection[str] | None = None) -> str:
    """A hash of the settings that affect results, of all sections or the named ones (see UPSTREAM)."""
    return hashlib.blake2b(json.dumps(_binding(config, sections), sort_keys=True).encode(), digest_size=12).hexdigest()


def differences(a: RunConfig, b: RunConfig, sections: Collection[str] | None = None) -> list[str]:
    """`key: value of a -> value of b` for every setting that affects results and differs."""
    old, new = _binding(a, sections), _binding(b, sections)
    return [f"{key}: {_shown(old[key])} -> {_shown(new[key])}" for key in old if old[key] != new[key]]


def validate_against(config: RunConfig, model: ModelConfig) -> None:
    """What can be checked only when the teacher is known. Raises ConfigError naming the key and both numbers."""
    depth = model.num_layers
    layers_in_budget(config.select.budget, depth, "select.budget")
    for budget in config.score.budgets:
        layers_in_budget(budget, depth, "score.budgets")
    if config.select.layers:
        check_layers(config.select.layers, depth)
    # Fine-tuning may go beyond the teacher's context; the stages that read the teacher's output may not.
    for section in ("align", "score", "distill", "evaluate"):
        length = getattr(config, section).sequence_length
        if length > model.max_position_embeddings:
            raise ConfigError(
                f"{section}.sequence_length {length} is beyond the {model.max_position_embeddings} tokens of context "
                "that the teacher has."
            )


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
            model = _section(model.model_fields[part]) if part in model.model_fields else None
    return parts


def _nearest(key: str) -> str:
    known = [name for name, _ in _fields(RunConfig)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # right word, wrong or missing section
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.7)]
    return f" Did you mean {close[0]!r}?" if close else " `jaxhybrid settings` lists every setting."


def _described(key: str) -> str:
    return next((f": {field.description}" for name, field in _fields(RunConfig) if name == key), "")


# --- walking the tree -------------------------------------------------------------------------------------------------


def _fields(model: type[BaseModel], prefix: str = "", binding: bool = False) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of every setting and section, in reading order. `binding` leaves out the free ones."""
    for name, field in model.model_fields.items():
        if binding and isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"):
            continue
        yield prefix + name, field
        section = _section(field)
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.", binding)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds a section, optional or not."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _binding(config: RunConfig, sections: Collection[str] | None) -> dict[str, Any]:
    """Dotted key -> value of every setting that affects results; an absent section gives nulls."""
    values: dict[str, Any] = {}
    tree = config.model_dump(mode="json")
    for key, field in _fields(RunConfig, binding=True):
        if sections is not None and key.partition(".")[0] not in sections:
            continue
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if _section(field) is None:
            values[key] = value
    return values


def _type_name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return "|".join(args)
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(_type_name(arg) for arg in args))
    if origin is tuple:
        return f"list of {_type_name(args[0])}"
    return {"str": "text", "NoneType": "null"}.get(kind.__name__, kind.__name__)


def _shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}"
    return "null" if value is None else str(value) or "''"
