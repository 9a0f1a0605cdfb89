"""What settings are made of: a section, its fields, and the types of their values."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from jaxhybrid.model.config import Remat

Dtype = Literal["bfloat16", "float32"]
Optimizer = Literal["adamw", "adafactor"]
Schedule = Literal["constant", "cosine", "linear"]
RankBy = Literal["heldout", "train"]
UniformBy = Literal["last", "first"]
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_sources(value: Any) -> Any:
    return (value,) if isinstance(value, str) else as_tuple(value)


# Tuples, written as YAML lists; Ints may be 0, Counts not.
Counts = Annotated[tuple[Count, ...], BeforeValidator(as_tuple)]
Ints = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Sources = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_sources), Field(min_length=1)]


def _as_policy(value: Any) -> Any:
    return {True: "block", False: "none"}[value] if isinstance(value, bool) else value


def _as_offloaded(value: Any) -> Any:
    if isinstance(value, str):
        return () if value == "none" else (value,)
    return as_tuple(value)


# A list; one name, or none, may stand alone.
Offload = Annotated[tuple[Literal["moments", "masters", "teacher"], ...], BeforeValidator(_as_offloaded)]

# What earlier versions had as true and false is read, too.
RematPolicy = Annotated[Remat, BeforeValidator(_as_policy)]


def about(default: Any, description: str) -> Any:
    return Field(default, description=description)


def free(default: Any, description: str) -> Any:
    """A setting that changes speed, memory, logging or a report, never what is trained (beyond rounding): a run folder
    may be continued under another value of it."""
    return Field(default, description=description, json_schema_extra={"free": True})


class Section(BaseModel):
    """Frozen, strict about types, and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def whole(cls) -> type[Self]:
        """The section with all of its fields; one whose fields are declared elsewhere has more than the class."""
        return cls
