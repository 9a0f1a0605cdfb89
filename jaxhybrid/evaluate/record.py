"""What a run records of its models: held-out figures and recall of the teacher and of each trained student."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.evaluate.quality import evaluate_quality
from jaxhybrid.evaluate.recall import compare_recall
from jaxhybrid.evaluate.recall_prompts import RecallTask
from jaxhybrid.model.transformer import Model
from jaxhybrid.settings.run import EvaluateConfig


def evaluation_record(
    models: dict[str, Model],
    settings: EvaluateConfig,
    heldout: Sequence[dict[str, np.ndarray]],
    tasks: Sequence[RecallTask],
    *,
    softmax_layers: list[int] | None,
    mesh: Mesh,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """`evaluation.json`. `models` by name, the teacher first; all are placed on `mesh`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        quality = evaluate_quality(model, models["teacher"], heldout, mesh, dtype)
        rows[name] = {key: quality[key] for key in ("perplexity", "kl", "tokens")}
    batch_tokens = settings.batch_size * settings.sequence_length
    return {
        "models": rows,
        "softmax_layers": softmax_layers,
        "heldout_tokens": settings.heldout_tokens,
        "recall": compare_recall(models, tasks, batch_tokens=batch_tokens, dtype=dtype),
    }
