"""What a run records of its models: held-out figures and recall of the teacher and of each trained student."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.evaluate.quality import compare_quality
from jaxhybrid.evaluate.recall import compare_recall
from jaxhybrid.evaluate.recall_prompts import RecallTask
from jaxhybrid.model.transformer import Model
from jaxhybrid.settings.evaluate import EvaluateConfig

WHOLE = ("perplexity", "kl", "kl_reverse", "agreement", "tokens", "intervals")  # of a model's row


def evaluation_record(
    models: dict[str, Model],
    settings: EvaluateConfig,
    heldout: dict[int, Sequence[dict[str, np.ndarray]]],
    tasks: Sequence[RecallTask],
    *,
    softmax_layers: list[int] | None,
    mesh: Mesh,
    dtype: Any = jnp.bfloat16,
) -> dict[str, Any]:
    """`evaluation.json`. `models` by name, the teacher first; all are placed on `mesh`.

    Args:
        heldout: batches of held-out text by the length of their rows, `settings.sequence_length` first.
    """
    quality = {length: compare_quality(models, batches, mesh, dtype) for length, batches in heldout.items()}
    first = quality[settings.sequence_length]
    return {
        "models": {name: {key: figures[key] for key in WHOLE} for name, figures in first.items()},
        "softmax_layers": softmax_layers,
        "heldout_tokens": settings.heldout_tokens,
        "quality": [{"sequence_length": length, "models": figures} for length, figures in quality.items()],
        "recall": compare_recall(models, tasks, batch_tokens=settings.batch_tokens, dtype=dtype),
    }
