"""Made-up recall prompts as a measure of one layer's replacement."""

from functools import cached_property
from typing import Annotated

from pydantic import Field

from jaxhybrid.evaluate.recall_prompts import RecallTask
from jaxhybrid.selection.choice import Given
from jaxhybrid.selection.questions import Answered, recall_prompts
from jaxhybrid.settings.select import MethodConfig
from jaxhybrid.settings.types import Count, about


class RecallMeasureConfig(MethodConfig):
    """Prompts as those of the evaluation's recall probe, others than its own."""

    pairs: Annotated[int, Field(ge=2)] = about(16, "pairs listed in a prompt, each of them asked for")
    samples: Count = about(250, "prompts")


class ReplacedOnce:
    """The teacher, and the teacher with one layer's attention replaced by its aligned mixer, answering prompts."""

    def __init__(self, given: Given, settings: RecallMeasureConfig):
        self._given, self._settings = given, settings
        self.student = given.student()

    @cached_property
    def prompts(self) -> RecallTask:
        name, context = self._given.settings.method, self.student.teacher.config.max_position_embeddings
        vocabulary, wanted = self._given.vocabulary(), self._settings
        return recall_prompts(vocabulary, wanted.pairs, wanted.samples, context, f"select.{name}.pairs")

    def whole(self) -> Answered:
        return self._answer(frozenset())

    def each(self) -> list[Answered]:
        """Without each of the layers."""
        return [self._answer(frozenset({layer})) for layer in range(self._given.depth)]

    @property
    def forward_tokens(self) -> int:
        return (self._given.depth + 1) * self.prompts.tokens.size

    def _answer(self, replaced: frozenset[int]) -> Answered:
        kept = frozenset(range(self._given.depth)) - replaced
        return self.student.answer(self.prompts, kept, self._given.settings.measure.batch_size)
