"""Perplexity on held-out text, and KL to the teacher."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.errors import DataError
from jaxhybrid.losses import linear_cross_entropy, linear_kl, next_token_targets
from jaxhybrid.model.transformer import Model, outputs
from jaxhybrid.stages.batch import Batch, token_mask
from jaxhybrid.train.placement import place_batch


def evaluate_quality(
    model: Model, teacher: Model, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, dtype: Any = jnp.bfloat16
) -> dict[str, float]:
    """`perplexity` and `teacher_perplexity` per predicted token, `kl` to the teacher in nats per token, `tokens`.

    Models are placed on `mesh`; batches are host arrays of equal shape.

    Raises:
        DataError: no batch, or none with a predicted token.
    """
    measure = jax.jit(partial(_sums, dtype=dtype))
    totals = np.zeros(5)
    for batch in batches:
        totals += np.array([float(x) for x in measure(model, teacher, place_batch(batch, mesh))])
    cross_entropy, teacher_cross_entropy, kl, predicted, tokens = totals
    if not predicted:
        raise DataError("The held-out text has no token to predict; give it more text (data.heldout).")
    return {
        "perplexity": math.exp(cross_entropy / predicted),
        "teacher_perplexity": math.exp(teacher_cross_entropy / predicted),
        "kl": kl / tokens,
        "tokens": int(tokens),
    }


def _sums(model: Model, teacher: Model, batch: Batch, dtype: Any) -> tuple[jax.Array, ...]:
    targets, mask = next_token_targets(batch["tokens"], batch["segment_ids"])
    own, other = (outputs(m, batch["tokens"], batch["segment_ids"], dtype=dtype) for m in (model, teacher))
    tokens = token_mask(batch["segment_ids"])
    return (
        linear_cross_entropy(*own, targets, mask),
        linear_cross_entropy(*other, targets, mask),
        linear_kl(*own, *other, tokens),
        jnp.sum(mask),
        jnp.sum(tokens),
    )
