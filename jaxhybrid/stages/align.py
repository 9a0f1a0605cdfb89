"""Stage 1: each linear mixer learns to give what the teacher's softmax layer gives for the same input.

The student's mixers sit beside the teacher's layers: they see the teacher's normed input and their output goes nowhere
but the loss. A layer's gradient is therefore local, and is taken inside the forward walk over the layers: no activation
of another layer is kept, so memory beyond parameters does not grow with depth.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.losses import alignment_loss
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.layers import rms_norm
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.params import Params, cast_params
from jaxhybrid.model.partition import gather
from jaxhybrid.model.transformer import add_mlp, declare, embed, layer_runs, stack, take_layers, token_context
from jaxhybrid.stages.batch import Batch, Metrics, accumulate, count_tokens, token_mask
from jaxhybrid.train.optimizer import TrainState, update


def align_step(
    state: TrainState,
    teacher_params: Params,
    batch: Batch,
    *,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
) -> tuple[TrainState, Metrics]:
    """One update of the linear mixers. `state.params` is the student's `mixers` tree without its softmax part.

    Metrics: `loss`, mean over layers and tokens of ||teacher - student||_2 / sqrt(D); `layer_loss` [linear layers] in
    order; `gradient_norm`; `batch_tokens`.
    """
    losses, gradients = alignment_gradients(
        state.params, teacher_params, batch, teacher_config=teacher_config, student_config=student_config, dtype=dtype
    )
    state, norm = update(state, gradients, optimizer)
    return state, {
        "loss": jnp.mean(losses),
        "layer_loss": losses,
        "gradient_norm": norm,
        "batch_tokens": count_tokens(batch),
    }


def alignment_gradients(
    mixers: Params,
    teacher_params: Params,
    batch: Batch,
    *,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    dtype: Any = jnp.bfloat16,
) -> tuple[jax.Array, Params]:
    """(loss of each linear layer [n], gradients of their mean for `mixers`)."""
    tokens = count_tokens(batch)

    def walk(micro: Batch) -> tuple[jax.Array, Params]:
        return _walk_layers(mixers, teacher_params, micro, tokens, teacher_config, student_config, dtype)

    losses, gradients = accumulate(walk, batch)
    count = losses.shape[0]
    return losses, jax.tree.map(lambda g: g / count, gradients)


def align_loss(
    mixers: Params,
    teacher_params: Params,
    batch: Batch,
    *,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    dtype: Any = jnp.bfloat16,
) -> jax.Array:
    """The loss of each linear layer [n], without gradients: for held-out text and for comparing initial values."""
    return _walk_layers(
        mixers, teacher_params, batch, count_tokens(batch), teacher_config, student_config, dtype, gradients=False
    )[0]


def _walk_layers(
    mixers: Params,
    teacher_params: Params,
    batch: Batch,
    tokens: jax.Array,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    dtype: Any,
    gradients: bool = True,
) -> tuple[jax.Array, Params]:
    teacher = cast_params(teacher_params, declare(teacher_config), dtype)
    context = token_context(teacher_config, batch["tokens"], batch["segment_ids"], None)
    mask = token_mask(batch["segment_ids"])
    x = embed(teacher, batch["tokens"])
    losses: dict[str, list[jax.Array]] = {kind: [] for kind in mixers}
    collected: dict[str, list[Params]] = {kind: [] for kind in mixers}

    for run in layer_runs(student_config.layer_types):
        aligned = run.kind in mixers
        mixer_specs = stack(MIXERS[run.kind].declare(student_config), 1)

        def layer(
            x: jax.Array, weights: Any, run: Any = run, aligned: bool = aligned, specs: Params = mixer_specs
        ) -> Any:
            block_params, attention, mixer = weights
            block_params, attention = gather((block_params, attention))
            normed = rms_norm(x, block_params["input_norm"], teacher_config.norm_eps)
            target, _ = MIXERS[FULL_ATTENTION].apply(attention, teacher_config, normed, context)

            def loss(mixer: Params) -> jax.Array:
                compute = gather(cast_params(mixer, specs, dtype))
                output, _ = MIXERS[run.kind].apply(compute, student_config, normed, context)
                return alignment_loss(target, output, mask) / tokens

            x = add_mlp(block_params, teacher_config, x + target)
            if not aligned:
                return x, None
            return x, jax.value_and_grad(loss)(mixer) if gradients else (loss(mixer), None)

        rows = run.first, run.first + run.stop - run.start
        weights = (
            take_layers(teacher["blocks"], run.start, run.stop),
            take_layers(teacher["mixers"][FULL_ATTENTION], run.start, run.stop),
            take_layers(mixers[run.kind], *rows) if aligned else None,
        )
        x, out = jax.lax.scan(layer, x, weights)
        if aligned:
            losses[run.kind].append(out[0])
            collected[run.kind].append(out[1])

    def join(kind: str) -> Params:
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), *collected[kind])

    return (
        jnp.concatenate([row for kind in mixers for row in losses[kind]]),
        {kind: join(kind) for kind in mixers} if gradients else {},
    )


def linear_mixers(params: Params) -> Params:
    """The part of a student's parameters that alignment trains."""
    return {kind: weights for kind, weights in params["mixers"].items() if kind != FULL_ATTENTION}
