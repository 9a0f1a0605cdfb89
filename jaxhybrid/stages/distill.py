"""Stage 2: the whole student learns the teacher's next-token distribution, by KL over the full vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.losses import CHUNK_TOKENS, linear_kl
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.params import Params
from jaxhybrid.model.partition import gather
from jaxhybrid.model.transformer import head_matrix, hidden_states
from jaxhybrid.stages.batch import Batch, Metrics, accumulate, count_tokens, token_mask
from jaxhybrid.train.optimizer import TrainState, update


def distill_step(
    state: TrainState,
    teacher_params: Params,
    batch: Batch,
    *,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
    remat: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[TrainState, Metrics]:
    """One update of all student parameters on KL(teacher || student).

    Metrics: `loss`, the mean KL in nats per token; `gradient_norm`; `batch_tokens`.
    """
    tokens = count_tokens(batch)

    def gradients(micro: Batch) -> tuple[jax.Array, Params]:
        hidden, head = teacher_outputs(teacher_params, teacher_config, micro, dtype)

        def loss(params: Params) -> jax.Array:
            student = hidden_states(
                params, student_config, micro["tokens"], micro["segment_ids"], dtype=dtype, remat=remat
            )
            own_head = gather(head_matrix(params, student_config).astype(dtype))
            mask = token_mask(micro["segment_ids"])
            return linear_kl(student, own_head, hidden, head, mask, chunk_tokens=chunk_tokens) / tokens

        return jax.value_and_grad(loss)(state.params)

    loss, total = accumulate(gradients, batch)
    state, norm = update(state, total, optimizer)
    return state, {"loss": loss, "gradient_norm": norm, "batch_tokens": tokens}


def teacher_outputs(
    teacher_params: Params, teacher_config: ModelConfig, batch: Batch, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(final hidden states [B,T,D], head [D,S] whole on every device): all a KL needs of the teacher."""
    hidden = hidden_states(teacher_params, teacher_config, batch["tokens"], batch["segment_ids"], dtype=dtype)
    return hidden, gather(head_matrix(teacher_params, teacher_config).astype(dtype))
