"""The fields of all sections, by dotted key: walked, described, and written as one would in YAML."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxhybrid.settings.run import RunConfig
from jaxhybrid.settings.types import Section


def describe() -> str:
    """Every dotted key with its type, default and meaning, one to a line, sections with their heading."""
    lines = []
    for key, field in fields(RunConfig):
        section = section_of(field)
        if section is not None:
            lines.append(f"\n{key}: {(section.__doc__ or '').strip()}")
            continue
        default = "required" if field.is_required() else shown(field.get_default())
        lines.append(f"  {key}  [{_type_name(field.annotation)} = {default}]\n      {field.description}")
    return "\n".join(lines) + "\n"


def fields(model: type[BaseModel], prefix: str = "", binding: bool = False) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of every setting and section, in reading order. `binding` leaves out the free ones."""
    for name, field in model.model_fields.items():
        if binding and isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"):
            continue
        yield prefix + name, field
        section = section_of(field)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.", binding)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds a section, optional or not."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind.whole()
    return None


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


def shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(shown(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}"
    return "null" if value is None else str(value) or "''"
