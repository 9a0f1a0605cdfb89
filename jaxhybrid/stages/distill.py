"""Stage 2: the whole student learns the teacher's next-token distribution, by KL over the full vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.losses import CHUNK_TOKENS, linear_kl
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import ModelConfig, Remat
from jaxhybrid.model.transformer import Model, outputs
from jaxhybrid.stages.batch import Batch, Metrics, accumulate, count_tokens, token_mask
from jaxhybrid.train.optimizer import TrainState, update


def distill_step(
    state: TrainState,
    teacher: Model,
    batch: Batch,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
    remat: Remat = "block",
    unroll: bool = False,
    sums: Any = jnp.float32,
    chunk_tokens: int = CHUNK_TOKENS,
    float8_teacher: bool = False,
) -> tuple[TrainState, Metrics]:
    """One update of all student parameters on KL(teacher || student). `config` is the student's.

    Metrics: `loss`, the mean KL in nats per token; `gradient_norm`; `batch_tokens`.

    Args:
        float8_teacher: the teacher's MLPs multiply in float8, and the KL is to what comes out.

    Raises:
        ConfigError: `float8_teacher`, and the teacher's MLPs are mixtures of experts.
    """
    if float8_teacher:
        teacher = teacher.in_float8()
    tokens = count_tokens(batch)

    def gradients(micro: Batch) -> tuple[jax.Array, Params]:
        text = micro["tokens"], micro["segment_ids"]
        with jax.named_scope("teacher"):
            hidden, head = outputs(teacher, *text, dtype=dtype, unroll=unroll)

        def loss(params: Params) -> jax.Array:
            given = {"dtype": dtype, "remat": remat, "unroll": unroll, "sums": sums}
            own_hidden, own_head = outputs(Model(params, config), *text, **given)
            mask = token_mask(micro["segment_ids"])
            return linear_kl(own_hidden, own_head, hidden, head, mask, chunk_tokens=chunk_tokens) / tokens

        return jax.value_and_grad(loss)(state.params)

    loss, total = accumulate(gradients, batch)
    state, norm = update(state, total, optimizer)
    return state, {"loss": loss, "gradient_norm": norm, "batch_tokens": tokens}
