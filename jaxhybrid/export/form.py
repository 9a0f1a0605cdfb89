"""The form of an export: an architecture that transformers has itself where that is exact, else code of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.native import QWEN3_5, Feature, features
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.fold import Fold, fold, norms
from jaxhybrid.weights.native import native_tensors
from jaxhybrid.weights.save import Written, read_scales

FORMATS = ("auto", "native", "remote-code")
NOT_BUILT = ("fla", "gguf")
# What else transformers has with softmax and linear layers, and why nothing is written for it.
OTHERS = {
    "olmo_hybrid": "norms stand after attention in its softmax layers, and before it in its linear ones",
    "granitemoehybrid": "its linear layers are Mamba-2, and it is not written yet",
}


@dataclass(frozen=True)
class Form:
    """How a student is written.

    Attributes:
        native: as `qwen3_5_text`; else with the code of this package.
        tensors, factors: see `save_weights`.
        told: what was chosen and why, for people.
    """

    native: bool
    told: str
    tensors: Sequence[Written] | None = None
    factors: Mapping[str, np.ndarray] = field(default_factory=dict)


def choose(model: Model, dtype: str, asked: str) -> Form:
    """The form that was asked for; `auto` takes the native one if it is exact. All processes must call it.

    Raises:
        ConfigError: no such form, or the native one cannot express the model.
    """
    if asked not in FORMATS:
        known = f"choose {', '.join(FORMATS)}"
        raise ConfigError(f"export format {asked!r}{' is not built' * (asked in NOT_BUILT)}: {known}.")
    if asked == "remote-code":
        return Form(False, "")
    against = why_not_native(model.config)
    if against and asked == "native":
        raise ConfigError(f"export format 'native' is not possible.\n{against}\nChoose remote-code.")
    if against:
        return Form(False, f"{against}\nexported with its own code")
    found = fold(read_scales(model.params, model.config, jnp.dtype(dtype), norms(model.config)), model.config)
    rounded = _rounding(found, dtype)
    if rounded and asked == "auto":
        return Form(False, f"{rounded}\nexported with its own code; format=native takes it as it is")
    told = f"exported as {QWEN3_5}, which transformers has itself"
    return Form(True, f"{rounded}\n{told}".strip(), native_tensors(model.config), found.factors)


def why_not_native(config: ModelConfig) -> str:
    """A table of what the nearest architecture cannot say, and a line on each other one; empty if there is nothing."""
    against = [feature for feature in features(config) if not feature.fits]
    if not against:
        return ""
    lines = [f"{name}: {reason}" for name, reason in OTHERS.items()]
    return "\n".join([f"transformers' own {QWEN3_5} cannot express:", *_table(against), *lines])


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
