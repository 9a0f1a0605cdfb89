"""Settings of the evaluation: held-out text, recall, tasks with generated answers, lm-eval."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxhybrid.settings.types import Count, Counts, Ints, Names, Section, about, as_tuple

RulerTask = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip
RulerTasks = Annotated[tuple[RulerTask, ...], BeforeValidator(as_tuple)]
Depths = Annotated[tuple[Annotated[int, Field(ge=0, le=100)], ...], BeforeValidator(as_tuple)]


class RecallConfig(Section):
    """Made-up associative recall: a list of names and numbers, then the same names again, each number asked for."""

    pairs: Counts = about((4, 16, 64), "lengths of the list, one set of figures each; [] leaves the probe out")
    filler: Ints = about((0,), "tokens of made-up prose between list and questions; every length with each")
    samples: Count = about(500, "prompts for each length and filler; each asks for every number of its list")


class RulerConfig(Section):
    """Tasks of RULER (arXiv 2404.06654): needles in a haystack, variables, frequent words, questions. The model writes
    its answers."""

    tasks: RulerTasks = about((), "which tasks; [] none. qa_1 needs squad, qa_2 hotpotqa")
    lengths: Counts = about((4096,), "tokens of prompt and answer together; every task at each")
    samples: Count = about(500, "prompts of each task and length")
    depths: Depths = about((), "percent of the haystack before the needle that is asked for, in turn; []: drawn")
    seed: int = about(42, "seed of the prompts")
    chat: bool | None = about(None, "put prompts through the tokenizer's chat template; null: if it has one")
    essays: Names = about((), "text sources whose text is the haystack of essays; []: made-up prose")
    squad: str | None = about(None, "SQuAD 2.0's JSON file, for qa_1")
    hotpotqa: str | None = about(None, "HotpotQA's JSON file (dev, distractor), for qa_2")

    @model_validator(mode="after")
    def _check(self) -> "RulerConfig":
        for task, name in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
            if task in self.tasks and getattr(self, name) is None:
                raise ValueError(f"tasks has {task}, which is made from a file: give evaluate.ruler.{name}")
        for name in ("tasks", "lengths"):
            given = getattr(self, name)
            if repeated := sorted({value for value in given if given.count(value) > 1}):
                raise ValueError(f"{name} has {repeated[0]} twice")
        return self


class CompletionConfig(Section):
    """Texts that stop before a value that stands in them: FDA, SWDE, SQuAD (arXiv 2402.18668), or files like them."""

    sources: Names = about(
        (), "one task each: hub:ID[:CONFIG[:SPLIT]], or a file of parquet, arrow, jsonl, json or csv"
    )
    text_field: str = about("text", "column or field of the text that is to go on")
    answer_field: str = about("value", "column or field of the value that comes next")
    samples: Count | None = about(None, "first rows of each source; null: all")
    new_tokens: Count = about(48, "tokens of an answer at most; it ends with the line")


class LmEvalConfig(Section):
    """Tasks of lm-evaluation-harness, as `jaxhybrid benchmark` runs them; needs the `eval` extra."""

    tasks: Names = about((), "tasks, such as arc_easy; [] none")
    task_folder: str | None = about(None, "folder with task files (YAML) of your own")
    shots: Annotated[int, Field(ge=0)] | None = about(None, "solved examples before a question; null: as the task says")
    limit: Count | None = about(None, "questions of each task; null: all")


class EvaluateConfig(Section):
    """Figures of teacher and student on held-out text and tasks."""

    heldout_tokens: Count = about(1_000_000, "held-out tokens of perplexity and KL")
    sequence_length: Annotated[int, Field(ge=2)] = about(4096, "tokens of a row")
    batch_size: Count = about(8, "rows of a step")
    lengths: Counts = about((), "further lengths of rows for perplexity and KL, each on the same tokens")
    ablations: bool = about(
        False, "also the last student with its linear layers off, and with its softmax layers off: who does the work"
    )
    recall: RecallConfig = about(RecallConfig(), "associative recall")
    ruler: RulerConfig = about(RulerConfig(), "RULER")
    completion: CompletionConfig = about(CompletionConfig(), "completion of texts")
    lm_eval: LmEvalConfig = about(LmEvalConfig(), "lm-evaluation-harness")

    @property
    def batch_tokens(self) -> int:
        """Tokens that are run at once."""
        return self.batch_size * self.sequence_length

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        for length in self.lengths:
            if length < 2 or length == self.sequence_length or self.lengths.count(length) > 1:
                raise ValueError(f"lengths has {length}; give lengths from 2 on, each once and not sequence_length")
        return self
