"""Stage 1: each linear mixer learns to give what the teacher's softmax layer gives for the same input.

The student's mixers sit beside the teacher's layers: they see the teacher's normed input and their output goes nowhere
but the loss. A layer's gradient is therefore local, and is taken inside the forward walk over the layers: no activation
of another layer is kept, so memory beyond parameters does not grow with depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxhybrid.losses import alignment_loss
from jaxhybrid.model.blueprint import Params, bind, variables
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.model.partition import (
    BATCH_AXES,
    active_specs,
    batch_spec,
    gather,
    near,
    on_shards,
    splits_tokens,
    total,
)
from jaxhybrid.model.transformer import Model, embed, token_context
from jaxhybrid.model.walk import collect, spread, walk
from jaxhybrid.stages.batch import Batch, Metrics, accumulate, count_tokens, token_mask
from jaxhybrid.train.optimizer import TrainState, update

Distance = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def align_step(
    state: TrainState,
    teacher: Model,
    batch: Batch,
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    dtype: Any = jnp.bfloat16,
    unroll: bool = False,
    sums: Any = jnp.float32,
    float8_teacher: bool = False,
) -> tuple[TrainState, Metrics]:
    """One update of the linear mixers. `state.params` is the student's `mixers` tree without its softmax part.

    `config` is the student's. Metrics: `loss`, mean over layers and tokens of ||teacher - student||_2 / sqrt(D);
    `layer_loss` [linear layers] in order; `gradient_norm`; `batch_tokens`.

    Args:
        float8_teacher: the teacher's MLPs multiply in float8, which changes what later layers see and give.

    Raises:
        ConfigError: `float8_teacher`, and the teacher's MLPs are mixtures of experts.
    """
    if float8_teacher:
        teacher = teacher.in_float8()
    given = {"config": config, "dtype": dtype, "unroll": unroll, "sums": sums}
    losses, gradients = alignment_gradients(state.params, teacher, batch, **given)
    state, norm = update(state, gradients, optimizer)
    return state, {
        "loss": jnp.mean(losses),
        "layer_loss": losses,
        "gradient_norm": norm,
        "batch_tokens": count_tokens(batch),
    }


def alignment_gradients(
    mixers: Params,
    teacher: Model,
    batch: Batch,
    *,
    config: ModelConfig,
    dtype: Any = jnp.bfloat16,
    unroll: bool = False,
    sums: Any = jnp.float32,
) -> tuple[jax.Array, Params]:
    """(loss of each linear layer [n], gradients of their mean for `mixers`)."""
    tokens = count_tokens(batch)

    def gradients(micro: Batch) -> tuple[jax.Array, Params]:
        compute = config, dtype, sums, unroll
        return _beside_teacher(mixers, teacher, micro, tokens, *compute, alignment_loss, gradients=True)

    losses, total = accumulate(gradients, batch)
    count = losses.shape[0]
    return losses, jax.tree.map(lambda g: g / count, total)


def align_loss(
    mixers: Params,
    teacher: Model,
    batch: Batch,
    *,
    config: ModelConfig,
    dtype: Any = jnp.bfloat16,
    distance: Distance = alignment_loss,
) -> jax.Array:
    """The loss of each linear layer [n], without gradients: for held-out text and for comparing initial values.

    distance: (target, output, mask) -> its sum over tokens.
    """
    tokens = count_tokens(batch)
    compute = config, dtype, jnp.float32, False
    return _beside_teacher(mixers, teacher, batch, tokens, *compute, distance, gradients=False)[0]


def _beside_teacher(
    mixers: Params,
    teacher: Model,
    batch: Batch,
    tokens: jax.Array,
    config: ModelConfig,
    dtype: Any,
    sums: Any,
    unroll: bool,
    distance: Distance,
    gradients: bool,
) -> tuple[jax.Array, Params]:
    ((kind, stack),) = mixers.items()
    spec, linear = batch_spec(batch["tokens"]), STUDENT_MIXERS[kind]
    own_specs = active_specs(variables(linear, config, len(jax.tree.leaves(stack)[0])))
    is_split = splits_tokens(spec)
    run = partial(_beside_own_teacher, teacher.config, config, kind, dtype, sums, unroll, distance, is_split, gradients)
    arguments = teacher.params, stack, batch["tokens"], batch["segment_ids"], tokens
    results = P(), own_specs if gradients else P()
    losses, found = on_shards(run, arguments, (teacher.specs, own_specs, spec, spec, P()), results)
    return losses, {kind: found} if gradients else {}


def _beside_own_teacher(
    teacher_config: ModelConfig,
    config: ModelConfig,
    kind: str,
    dtype: Any,
    sums: Any,
    unroll: bool,
    distance: Distance,
    is_split: bool,
    gradients: bool,
    params: Params,
    stack: Params,
    tokens_BT: jax.Array,
    segment_ids: jax.Array,
    tokens: jax.Array,
) -> tuple[jax.Array, Params]:
    """On this device's tokens: (summed loss of each linear layer / `tokens` of the batch, its gradients)."""
    context = token_context(teacher_config, tokens_BT, segment_ids, None, is_split)
    mask, linear = token_mask(segment_ids), STUDENT_MIXERS[kind]
    is_linear = [name == kind for name in config.layer_types]

    def mix(normed: jax.Array, attention: Any, context: TokenContext, beside: Any) -> tuple[jax.Array, Any]:
        target, _ = attention(normed, context)

        def loss(own: Params) -> jax.Array:
            with jax.named_scope(kind):
                mixer = bind(linear, config, gather(variables(linear, config), own, dtype, sums))
                return total(distance(target, mixer(normed, context)[0], mask), *BATCH_AXES) / tokens

        def measure(own: Params) -> Any:
            return jax.value_and_grad(loss)(own) if gradients else (loss(own), None)

        aligned, own = beside
        if all(is_linear):
            return target, measure(own)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(measure, own))
        return target, jax.lax.cond(aligned, measure, lambda own: nothing, own)

    own = stack if all(is_linear) else spread(near(stack), config.layer_types, kind)
    extra = {FULL_ATTENTION: (jnp.array(is_linear), own)}
    x = embed(Model(params, teacher_config), tokens_BT, dtype)
    _, found = walk(params, teacher_config, x, context, mix, extra=extra, unroll=unroll)
    return collect(found[FULL_ATTENTION], config.layer_types, kind)


def linear_mixers(params: Params) -> Params:
    """The part of a student's parameters that alignment trains."""
    return {kind: weights for kind, weights in params["mixers"].items() if kind != FULL_ATTENTION}
