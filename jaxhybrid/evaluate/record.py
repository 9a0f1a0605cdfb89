"""What a run records of its models: figures of teacher and trained students, on held-out text and in tasks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.ablation import ablations
from jaxhybrid.evaluate.completion import completion_prompts
from jaxhybrid.evaluate.prompts import Asker, PromptSet
from jaxhybrid.evaluate.quality import compare_quality
from jaxhybrid.evaluate.recall import compare_recall
from jaxhybrid.evaluate.recall_prompts import RecallTask, recall_tasks
from jaxhybrid.evaluate.ruler import ruler_prompts
from jaxhybrid.evaluate.written import compare_written, require_room
from jaxhybrid.files import write_text
from jaxhybrid.model.transformer import Model
from jaxhybrid.settings.evaluate import EvaluateConfig, LmEvalConfig

WHOLE = ("perplexity", "kl", "kl_reverse", "agreement", "tokens", "intervals")  # of a model's row


@dataclass(frozen=True)
class Asked:
    """The prompts of a run, and what reads the answers."""

    recall: Sequence[RecallTask]
    written: Sequence[PromptSet]  # their answers are
    vocabulary: Vocabulary
    end_ids: Sequence[int]


def prepare(
    settings: EvaluateConfig, vocabulary: Vocabulary, end_ids: Sequence[int], context: int, folder: Path, processes: int
) -> Asked:
    """All prompts, those of written answers frozen in files of `folder`; tasks of lm-eval are looked up.

    Args:
        context: the teacher's, in tokens.

    Raises:
        ConfigError: a prompt is longer than `context`, a task is not known, or there are several processes and answers
            are to be written.
        DataError: a source of prompts cannot be read.
    """
    ruler, completion, harness = settings.ruler, settings.completion, settings.lm_eval
    if processes > 1 and (ruler.tasks or completion.sources or harness.tasks):
        raise ConfigError(
            "evaluate.ruler, completion and lm_eval run in one process, with all its devices; there are "
            f"{processes}. Leave them out of this run and give them to `jaxhybrid evaluate` in one process afterwards."
        )
    if harness.tasks:
        _harness().find_tasks(harness.tasks, _task_folder(harness))
    sets: list[PromptSet] = []
    if ruler.tasks:
        sets += ruler_prompts(ruler, Asker.of(vocabulary, ruler.chat, "evaluate.ruler.chat"), folder)
    if completion.sources:
        sets += completion_prompts(completion, Asker(vocabulary, chat=False), folder)
    for given in sets:
        require_room(given, context)
    return Asked(recall_tasks(vocabulary, settings.recall, context), sets, vocabulary, end_ids)


def evaluation_record(
    models: dict[str, Model],
    settings: EvaluateConfig,
    heldout: dict[int, Sequence[dict[str, np.ndarray]]],
    asked: Asked,
    *,
    softmax_layers: list[int] | None,
    rows: dict[str, dict[str, Any]],
    answers: Path,
    mesh: Mesh,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """`evaluation.json`. `models` by name, the teacher first; all are placed on `mesh`.

    Args:
        heldout: batches of held-out text by the length of their rows, `settings.sequence_length` first.
        rows: what each model's row says beside its figures: how it was made.
        answers: folder for the answers that models write, a file of each model and task.
    """
    if settings.ablations and len(models) > 1:
        last = list(models)[-1]
        off = ablations(last, models[last])
        models, rows = models | off, rows | dict.fromkeys(off, rows[last])

    def keep(name: str, given: PromptSet, said: list[str], scores: np.ndarray) -> None:
        found = zip(given.prompts, said, scores.tolist())
        lines = [{"score": score, "answers": prompt.answers, "said": text} for prompt, text, score in found]
        path = answers / name.replace(", ", "-").replace(" ", "-") / f"{given.file_name}.jsonl"
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    quality = {length: compare_quality(models, batches, mesh, dtype) for length, batches in heldout.items()}
    first = quality[settings.sequence_length]
    return {
        "models": {name: {key: figures[key] for key in WHOLE} | rows[name] for name, figures in first.items()},
        "softmax_layers": softmax_layers,
        "heldout_tokens": settings.heldout_tokens,
        "quality": [{"sequence_length": length, "models": figures} for length, figures in quality.items()],
        "recall": compare_recall(models, asked.recall, batch_tokens=settings.batch_tokens, dtype=dtype),
        "tasks": compare_written(
            models,
            asked.written,
            asked.vocabulary,
            asked.end_ids,
            batch_tokens=settings.batch_tokens,
            dtype=dtype,
            keep=keep,
        ),
        "lm_eval": _lm_eval(models, settings, asked, dtype),
    }


def _lm_eval(models: dict[str, Model], settings: EvaluateConfig, asked: Asked, dtype: Any) -> dict[str, Any]:
    """Model -> task -> figure; nothing where no task is asked for."""
    given = settings.lm_eval
    if not given.tasks:
        return {}
    return {
        name: _harness().run_tasks(
            model,
            asked.vocabulary,
            asked.end_ids,
            given.tasks,
            task_folder=_task_folder(given),
            shots=given.shots,
            limit=given.limit,
            batch_size=settings.batch_size,
            dtype=jnp.dtype(dtype).name,
            cut=False,
        )
        for name, model in models.items()
    }


def _task_folder(settings: LmEvalConfig) -> Path | None:
    return None if settings.task_folder is None else Path(settings.task_folder).expanduser()


def _harness() -> Any:
    """Imported when it is needed: an extra, and seconds."""
    try:
        from jaxhybrid.evaluate import harness
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError(
            "evaluate.lm_eval needs lm-eval: `uv sync --extra eval`, or `pip install lm-eval`."
        ) from error
    return harness
