"""Two configs compared: which settings that affect results differ, and what a stage's result depends on."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from jaxhybrid.settings.fields import fields, section_of, shown
from jaxhybrid.settings.run import RunConfig

# The sections whose settings a stage's result depends on; selection may use the scores, so what follows does too.
_SHARED = ("seed", "teacher", "dtype", "mixer", "data")
_IN_ORDER = ("align", "score", "select", "softmax", "distill", "finetune")  # `softmax` is of the hybrid: no stage
UPSTREAM = {stage: (*_SHARED, *_IN_ORDER[: place + 1]) for place, stage in enumerate(_IN_ORDER)}


def fingerprint(config: RunConfig, sections: Collection[str] | None = None) -> str:
    """A hash of the settings that affect results, of all sections or the named ones (see UPSTREAM)."""
    return hashlib.blake2b(json.dumps(_binding(config, sections), sort_keys=True).encode(), digest_size=12).hexdigest()


def differences(a: RunConfig, b: RunConfig, sections: Collection[str] | None = None) -> list[str]:
    """`key: value of a -> value of b` for every setting that affects results and differs."""
    old, new = _binding(a, sections), _binding(b, sections)
    shared = [key for key in old if key in new]  # a section that only one method reads: the method says it
    return [f"{key}: {shown(old[key])} -> {shown(new[key])}" for key in shared if old[key] != new[key]]


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of every setting."""
    return _binding(config, None, binding=False)


def _binding(config: RunConfig, sections: Collection[str] | None, binding: bool = True) -> dict[str, Any]:
    """Dotted key -> value of every setting that affects results; an absent section gives nulls, one that the method of
    selection does not read gives nothing."""
    values: dict[str, Any] = {}
    tree = config.model_dump(mode="json")
    idle = tuple(f"select.{name}." for name in config.select.idle) if binding else ()
    for key, field in fields(RunConfig, binding=binding):
        if sections is not None and key.partition(".")[0] not in sections:
            continue
        if key.startswith(idle):
            continue
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if section_of(field) is None:
            values[key] = value
    return values
