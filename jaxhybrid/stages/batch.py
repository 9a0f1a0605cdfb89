"""Batches and microbatches, common to the stages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.partition import near

# Packed text: "tokens" and "segment_ids", int32 [B,T], or [A,B,T] for A microbatches that make one update.
# Segment ids count documents from 1; 0 is padding.
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def token_mask(segment_ids: jax.Array) -> jax.Array:
    """1.0 where there is a token, 0.0 on padding."""
    return (segment_ids != 0).astype(jnp.float32)


def count_tokens(batch: Batch) -> jax.Array:
    """Tokens that are not padding, float32; at least 1, so that an empty batch does not divide by zero."""
    return jnp.maximum(jnp.sum(token_mask(batch["segment_ids"])), 1.0)


def accumulate(compute: Callable[[Batch], Any], batch: Batch) -> Any:
    """Sum of `compute(microbatch)` over the microbatches, with one of them in memory at a time; gradients of offloaded
    parameters come in from the host's memory."""
    if batch["tokens"].ndim == 2:
        return near(compute(batch))

    def add(total: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, near(compute(micro))), None

    # From zeros and not from the first one's result: `compute`, a whole gradient, is then compiled once.
    shapes = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], batch))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), batch)[0]
