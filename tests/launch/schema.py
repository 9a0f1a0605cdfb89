"""A strict check against the part of OpenAPI schemas that custom resources use."""

import re
from collections.abc import Iterator
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
KNOWN = {
    *("type", "properties", "additionalProperties", "required", "items", "enum", "pattern", "format", "anyOf"),
    *("minimum", "minLength", "maxLength", "maxItems", "x-kubernetes-int-or-string"),
}


def problems(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with `value`, a line each; properties that the schema does not name are refused."""
    if unknown := schema.keys() - KNOWN:
        raise NotImplementedError(f"schema of {where}: {unknown}")
    if schema.get("x-kubernetes-int-or-string"):
        if type(value) not in (int, str):
            yield f"{where}: {value!r} is neither a whole number nor a text"
        return
    if type(value) is not TYPES[schema["type"]]:
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: {value!r} does not match {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value} is below {schema['minimum']}"
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{where}: {value!r} is too short or too long"
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            yield f"{where}: more than {schema['maxItems']}"
        for number, item in enumerate(value):
            yield from problems(item, schema["items"], f"{where}[{number}]")
    if isinstance(value, dict):
        yield from (f"{where}: {key} is missing" for key in schema.get("required", []) if key not in value)
        named, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            if (own := named.get(key, others)) is not None:
                yield from problems(item, own, f"{where}.{key}")
            elif "properties" in schema:
                yield f"{where}: {key} is unknown"
