"""Stage 3: the hybrid on its own, by cross entropy, usually at a longer context."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.losses import CHUNK_TOKENS, linear_cross_entropy, next_token_targets
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig, Remat
from jaxhybrid.model.transformer import Model, outputs
from jaxhybrid.stages.batch import Batch, Metrics, accumulate
from jaxhybrid.train.optimizer import TrainState, update


def count_predicted(batch: Batch) -> jax.Array:
    """Tokens with a successor in their document, float32."""
    return jnp.sum(next_token_targets(batch["tokens"], batch["segment_ids"])[1])


def finetune_step(
    state: TrainState,
    batch: Batch,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
    remat: Remat = "block",
    unroll: bool = False,
    sums: Any = jnp.float32,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[TrainState, Metrics]:
    """One update of all student parameters on next-token cross entropy. `config` is the student's.

    Metrics: `loss`, nats per predicted token; `gradient_norm`; `batch_tokens`, those with a successor.
    """
    tokens = jnp.maximum(accumulate(count_predicted, batch), 1.0)

    def gradients(micro: Batch) -> tuple[jax.Array, Params]:
        targets, mask = next_token_targets(micro["tokens"], micro["segment_ids"])

        def loss(params: Params) -> jax.Array:
            student = Model(params, config)
            text = micro["tokens"], micro["segment_ids"]
            hidden, head = outputs(student, *text, dtype=dtype, remat=remat, unroll=unroll, sums=sums)
            return linear_cross_entropy(hidden, head, targets, mask, chunk_tokens=chunk_tokens) / tokens

        return jax.value_and_grad(loss)(state.params)

    loss, total = accumulate(gradients, batch)
    state, norm = update(state, total, optimizer)
    return state, {"loss": loss, "gradient_norm": norm, "batch_tokens": tokens}
