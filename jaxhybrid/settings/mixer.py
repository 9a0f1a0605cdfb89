"""Settings of the linear mixer: those that each mixer declares for itself, under one section."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import create_model, model_validator

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import MixerConfig
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.settings.types import Section, about


class MixerSection(Section):
    """The linear mixer that replaces softmax attention; `null` settings follow the teacher."""

    kind: Literal[tuple(STUDENT_MIXERS)] = about("gated_deltanet", "which linear mixer")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> "MixerSection":
        own = {item.name for item in fields(STUDENT_MIXERS[self.kind].Config)}
        for name, item in type(self).model_fields.items():
            if name not in own | {"kind"} and getattr(self, name) != item.default:
                raise ValueError(f"{name} is not a setting of {self.kind}; leave it out")
        try:
            self.to_model()
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("mixer.")) from error
        return self

    def to_model(self) -> MixerConfig:
        """The mixer's own settings."""
        known = STUDENT_MIXERS[self.kind].Config
        return known(**{item.name: getattr(self, item.name) for item in fields(known)})


def _mixer_fields() -> dict[str, Any]:
    """Every setting that a mixer declares, under its own name: (type, default and meaning)."""
    found: dict[str, Any] = {}
    for mixer in STUDENT_MIXERS.values():
        types = get_type_hints(mixer.Config)
        for item in fields(mixer.Config):
            declared = (types[item.name], item.default, item.metadata["about"])
            if found.setdefault(item.name, declared) != declared:
                raise TypeError(
                    f"{mixer.Config.__name__}.{item.name} differs from another mixer's; give it another name."
                )
    return {name: (kind, about(default, text)) for name, (kind, default, text) in found.items()}


if TYPE_CHECKING:
    MixerSettings = MixerSection
else:
    MixerSettings = create_model(
        "MixerSettings", __base__=MixerSection, __doc__=MixerSection.__doc__, **_mixer_fields()
    )
