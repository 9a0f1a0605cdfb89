"""Layer importance, the KL-guided way (arXiv 2512.20569, GA-S2): how well does the student do with one softmax layer?

A *candidate* is the aligned all-linear student with one layer's softmax attention put back. It is trained on KL to the
teacher for a while; the lower the KL, the more that layer is worth keeping. Which layer it is, is a traced number, so
one compiled program trains all candidates; the teacher's hidden states are computed once per batch and shared.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.losses import CHUNK_TOKENS, linear_kl
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, Remat
from jaxhybrid.model.head import Head
from jaxhybrid.model.transformer import Model, outputs
from jaxhybrid.stages.batch import Batch, Metrics, accumulate, count_tokens, token_mask
from jaxhybrid.train.optimizer import TrainState, update


def candidate_params(student: Model, teacher: Model, layer: jax.Array) -> Params:
    """The all-linear student's parameters, plus the teacher's attention of `layer` (traced) as a stack of one; float32.

    The attention is the student's where it has that of all layers beside its own mixers, else the teacher's.
    """
    attention = (teacher.params["mixers"] | student.params["mixers"])[FULL_ATTENTION]
    row = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, layer, 1), attention)
    params = {**student.params, "mixers": {**student.params["mixers"], FULL_ATTENTION: row}}
    return jax.tree.map(lambda w: w.astype(jnp.float32), params)


def score_step(
    state: TrainState,
    layer: jax.Array,
    batch: Batch,
    teacher_head: Head,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
    remat: Remat = "block",
    sums: Any = jnp.float32,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[TrainState, Metrics]:
    """One update of a candidate. `config` is the all-linear student's.

    `batch` also holds `teacher_hidden`, the teacher's final hidden states.

    Metrics: `loss`, the mean KL in nats per token before the update; `gradient_norm`; `batch_tokens`.
    """
    tokens = count_tokens(batch)

    def gradients(micro: Batch) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            total = candidate_kl(
                params, layer, micro, teacher_head,
                config=config, dtype=dtype, remat=remat, sums=sums, chunk_tokens=chunk_tokens,
            )  # fmt: skip
            return total / tokens

        return jax.value_and_grad(loss)(state.params)

    value, total = accumulate(gradients, batch)
    state, norm = update(state, total, optimizer)
    return state, {"loss": value, "gradient_norm": norm, "batch_tokens": tokens}


def candidate_kl(
    params: Params,
    layer: jax.Array,
    batch: Batch,
    teacher_head: Head,
    *,
    config: ModelConfig,
    dtype: Any = jnp.bfloat16,
    remat: Remat = "none",
    sums: Any = jnp.float32,
    chunk_tokens: int = CHUNK_TOKENS,
    counted: jax.Array | None = None,
) -> jax.Array:
    """KL(teacher || candidate) summed over the tokens, or those `counted` [B,T], of a batch with `teacher_hidden`."""
    softmax, mask = jnp.arange(config.num_layers) == layer, counted
    if mask is None:
        mask = token_mask(batch["segment_ids"])
    return masked_kl(
        Model(params, config), softmax, batch, mask, teacher_head,
        dtype=dtype, remat=remat, sums=sums, chunk_tokens=chunk_tokens,
    )  # fmt: skip


def masked_kl(
    student: Model,
    softmax: jax.Array,
    batch: Batch,
    mask: jax.Array,
    teacher_head: Head,
    *,
    dtype: Any = jnp.bfloat16,
    remat: Remat = "none",
    sums: Any = jnp.float32,
    chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
    """KL(teacher || student) summed over the tokens where `mask` [B,T] is 1, of a batch that holds `teacher_hidden`.

    The layers that are softmax in the all-linear `student` are a traced choice: see `hidden_states`.
    """
    text = batch["tokens"], batch["segment_ids"]
    hidden, head = outputs(student, *text, softmax=softmax, dtype=dtype, remat=remat, sums=sums)
    states = batch["teacher_hidden"].astype(dtype)
    return linear_kl(hidden, head, states, teacher_head.astype(dtype), mask, chunk_tokens=chunk_tokens)
