"""The form of an export: an architecture that transformers has itself where that is exact, else code of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.feature import Feature
from jaxhybrid.families.native import NATIVE, QWEN3_5, objections
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.transformer import Model
from jaxhybrid.settings.export_format import check_format
from jaxhybrid.weights.fold import Fold, fold, norms
from jaxhybrid.weights.native import native_tensors
from jaxhybrid.weights.save import Written, read_scales


@dataclass(frozen=True)
class Form:
    """How a student is written.

    Attributes:
        native: the architecture of transformers' own, by its model_type; None: with the code of this package.
        tensors, factors: see `save_weights`.
        told: what was chosen and why, for people.
    """

    native: str | None
    told: str
    tensors: Sequence[Written] | None = None
    factors: Mapping[str, np.ndarray] = field(default_factory=dict)


def choose(model: Model, dtype: str, asked: str) -> Form:
    """The form that was asked for; `auto` takes a native one if it is exact. All processes must call it.

    Raises:
        ConfigError: no such form (see `check_format`), or no native one can express the model.
    """
    check_format(asked)
    if asked == "remote-code":
        return Form(None, "")
    native = native_of(model.config)
    if native is None:
        against = why_not_native(model.config)
        if asked == "native":
            raise ConfigError(f"export format 'native' is not possible.\n{against}\nChoose remote-code.")
        return Form(None, f"{against}\nexported with its own code")
    found = Fold({}, {}, 0.0)
    if native == QWEN3_5:
        found = fold(read_scales(model.params, model.config, jnp.dtype(dtype), norms(model.config)), model.config)
    rounded = _rounding(found, dtype)
    if rounded and asked == "auto":
        return Form(None, f"{rounded}\nexported with its own code; format=native takes it as it is")
    since, warning = NATIVE[native].since, NATIVE[native].warning
    told = f"exported as {native}, which transformers has itself" + (
        f", as it is here from {since} on" if since else ""
    )
    told = "\n".join(filter(None, (rounded, told, warning)))
    return Form(native, told, native_tensors(model.config, native), found.factors)


def native_of(config: ModelConfig) -> str | None:
    """The architecture of transformers' own that expresses a student, if one does."""
    against = objections(config)
    return next((name for name, found in against.items() if name in NATIVE and not found), None)


def why_not_native(config: ModelConfig) -> str:
    """A table for each architecture of what it cannot say, the nearest first; empty if one can say all."""
    if native_of(config) is not None:
        return ""
    found = sorted(objections(config).items(), key=lambda item: len(item[1]))
    return "\n".join(
        line for name, against in found for line in (f"transformers' own {name} cannot express:", *_table(against))
    )


def _table(against: Sequence[Feature]) -> list[str]:
    rows = [("", "here", "there", "set before a run")]
    rows += [(feature.name, feature.here, feature.there, feature.remedy) for feature in against]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _rounding(found: Fold, dtype: str) -> str:
    if not found.rounded:
        return ""
    first, count = next(iter(found.rounded)), sum(found.rounded.values())
    return (
        f"{QWEN3_5} stores a norm's scale s as s - 1, which {dtype} cannot for {count} channels of "
        f"{len(found.rounded)} norms, {first} first: a scale changes by up to {found.largest_change:.0e} of itself"
    )
