"""Settings of the softmax layers that a hybrid keeps."""

from typing import Annotated

from pydantic import Field

from jaxhybrid.model.config import SoftmaxConfig
from jaxhybrid.settings.types import Section, about


class SoftmaxSection(Section):
    """The softmax layers that the hybrid keeps, from distillation on; HyPE (arXiv 2601.22156) sets both."""

    rope: bool = about(True, "rotate q and k as the teacher does; false: no positions (NoPE)")
    length_scale: Annotated[float, Field(gt=1)] | None = about(
        None, "a: multiply a query with t tokens of its document before it by log(t + a) / log(a); null: do not"
    )

    def to_model(self) -> SoftmaxConfig:
        return SoftmaxConfig(self.rope, self.length_scale)
