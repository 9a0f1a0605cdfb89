"""The three losses: alignment, KL to the teacher, cross entropy.

The last two are *linear*: they take hidden states and an output head and never hold logits of a whole batch. Tokens go
through the head in chunks; each chunk's gradient is formed while its logits are at hand, so the backward pass has
nothing left to do but scale. On a mesh every device has its own columns of the head (`model.head`), and the gradient of
those alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxhybrid_kernels import kl_sums

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.head import (
    SHARERS,
    Columns,
    Head,
    chosen,
    gathered,
    in_chunks,
    log_partition,
    own_columns,
    own_tokens,
)
from jaxhybrid.model.partition import (
    BATCH_AXES,
    SHARDS,
    active_mesh,
    axis_index,
    batch_spec,
    head_spec,
    joined,
    largest,
    on_shards,
    scattered,
    splits_tokens,
    total,
)

CHUNK_TOKENS = 2048  # logits at hand: CHUNK_TOKENS x vocabulary x 4 bytes, once for each model


def alignment_loss(target_BTD: jax.Array, output_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over unmasked tokens of ||target - output||_2 / sqrt(D) (RADLADS stage 1; the norm, not its square)."""
    difference = target_BTD.astype(jnp.float32) - output_BTD.astype(jnp.float32)
    # The tiny constant gives an exact match a gradient of zero instead of 0/0.
    distance_BT = jnp.sqrt(jnp.mean(difference * difference, axis=-1) + 1e-12)
    return jnp.sum(distance_BT * mask_BT)


def squared_error(target_BTD: jax.Array, output_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over unmasked tokens of the mean squared difference over D."""
    difference = target_BTD.astype(jnp.float32) - output_BTD.astype(jnp.float32)
    return jnp.sum(jnp.mean(difference * difference, axis=-1) * mask_BT)


def linear_kl(
    student_hidden_BTD: jax.Array,
    student_head: Head,
    teacher_hidden_BTD: jax.Array,
    teacher_head: Head,
    mask_BT: jax.Array,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
    """Sum over unmasked tokens of KL(teacher || student) over the whole vocabulary, a float32 scalar.

    Heads may be padded to different widths: only their first `vocab_size` columns are words. The two hidden widths may
    differ. Differentiable in the student's arguments only.
    """
    widths = student_head.shape[1], teacher_head.shape[1]
    words = min(widths) if vocab_size is None else vocab_size
    if words > min(widths):
        raise ConfigError(f"vocab_size {words} exceeds a head: student has {widths[0]} columns, teacher {widths[1]}.")
    teacher_hidden_BTD, teacher_head = jax.lax.stop_gradient((teacher_hidden_BTD, teacher_head))
    heads = tuple(_first_columns(head, words) for head in (student_head, teacher_head))
    return _summed_over_batch(_kl, chunk_tokens, student_hidden_BTD, heads[0], teacher_hidden_BTD, mask_BT, heads[1])


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
    """Sum over unmasked tokens of -log p(target), a float32 scalar."""
    return _summed_over_batch(_cross_entropy, chunk_tokens, hidden_BTD, head, targets_BT, mask_BT)


def next_token_targets(tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(targets, mask) [B,T]: each token's successor, where it exists in the same document."""

    def shift(tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        following, targets = (_successors(x, is_split) for x in (segments, tokens))
        return targets, ((segments == following) & (segments != 0)).astype(jnp.float32)

    spec = batch_spec(tokens_BT)
    is_split = splits_tokens(spec)
    return on_shards(shift, (tokens_BT, segment_ids_BT), (spec, spec), (spec, spec))


def _successors(x_BT: jax.Array, is_split: bool) -> jax.Array:
    """Each token's successor, 0 for the last one of a row."""
    T = x_BT.shape[1]
    if not is_split:
        return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))
    row = jnp.pad(joined(x_BT, 1, "context")[:, 1:], ((0, 0), (0, 1)))
    return jax.lax.dynamic_slice_in_dim(row, axis_index("context") * T, T, 1)


def _first_columns(head: Head, count: int) -> Head:
    if head.shape[1] == count:
        return head
    kernel = head.kernel if active_mesh() is None else jax.reshard(head.kernel, P(SHARDS, None))
    return replace(head, kernel=kernel[:, :count])


# --- objectives on one chunk of logits, of which a device has its own columns


def _kl(logits: jax.Array, _: jax.Array, teacher_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    # With e = exp(z - top):  KL = sum e_p (z_p - z_q) / sum e_p - log Z_p + log Z_q, all sums in one exchange.
    own = kl_sums(logits, teacher_logits)
    own_tops = jnp.stack([own.top, own.teacher_top])
    tops = largest(own_tops, *SHARERS)
    q_share, p_share = jnp.exp(own_tops - tops)
    q_sum, p_sum, difference = total(
        jnp.stack([q_share * own.total, p_share * own.teacher_total, p_share * own.difference]), *SHARERS
    )
    kl = difference / p_sum + (tops[0] - tops[1]) + (jnp.log(q_sum) - jnp.log(p_sum))
    q, p = jnp.exp(logits - tops[0][:, None]), jnp.exp(teacher_logits - tops[1][:, None])
    return kl, q / q_sum[:, None] - p / p_sum[:, None]


def _cross_entropy(logits: jax.Array, numbers: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    log_z = log_partition(logits)
    return log_z - chosen(logits, numbers, targets), jnp.exp(logits - log_z[:, None]) - (numbers == targets[:, None])


# --- the chunk walk they share

# (own columns of a chunk's logits, their numbers, the teacher's logits or the targets)
# -> (each token's loss, its gradient for the logits)
Objective = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Chunk = tuple[
    jax.Array, jax.Array, jax.Array
]  # a device's own tokens: hidden states, teacher's states or targets, mask


def _summed_over_batch(
    objective: Objective,
    chunk_tokens: int,
    hidden: jax.Array,
    head: Head,
    beside: jax.Array,
    mask: jax.Array,
    teacher_head: Head | None = None,
) -> jax.Array:
    vocab_size = head.shape[1]

    def local(hidden: jax.Array, head: Head, beside: jax.Array, mask: jax.Array, teacher_head: Any) -> jax.Array:
        columns, teacher = own_columns(head, vocab_size, hidden.dtype), None
        if teacher_head is not None:
            teacher = own_columns(teacher_head, vocab_size, beside.dtype)
        tokens = tuple(x.reshape(-1, *x.shape[2:]) for x in (beside, mask))
        flat = hidden.reshape(-1, hidden.shape[-1])
        static = objective, vocab_size, columns.cap, chunk_tokens
        loss = _linear_loss(*static, flat, columns.weight, columns.numbers, tokens, teacher)
        return total(loss, *BATCH_AXES)

    batch = batch_spec(hidden)
    heads = [None if matrix is None else head_spec(*matrix.shape) for matrix in (head, teacher_head)]
    with jax.named_scope("loss"):
        specs = batch, heads[0], batch, batch, heads[1]
        return on_shards(local, (hidden, head, beside, mask, teacher_head), specs, P())


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _linear_loss(
    objective: Objective,
    vocab_size: int,
    cap: float | None,
    chunk_tokens: int,
    hidden_ND: jax.Array,
    weight: jax.Array,
    numbers: jax.Array,
    tokens: tuple[jax.Array, jax.Array],
    teacher: Columns | None,
) -> jax.Array:
    """Summed over this device's tokens; `weight` and `numbers` are its columns of the head, which has this `cap`."""

    def chunk_loss(chunk: Chunk) -> jax.Array:
        return _chunk(objective, vocab_size, Columns(weight, numbers, cap), teacher, chunk)[0]

    return jnp.sum(jax.lax.map(chunk_loss, in_chunks((hidden_ND, *tokens), chunk_tokens)))


def _chunk(
    objective: Objective, vocab_size: int, columns: Columns, teacher: Columns | None, chunk: Chunk
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(summed loss of the device's tokens, and of all sharers' tokens hidden states and gradients of own columns)."""
    hidden, beside, mask = map(gathered, chunk)
    if teacher is not None:
        beside = teacher.logits(beside, vocab_size)
    logits = columns.logits(hidden, vocab_size)
    losses, gradient = objective(logits, columns.numbers, beside)
    gradient = columns.before_cap(gradient, logits)
    return jnp.sum(own_tokens(losses) * chunk[2]), hidden, (gradient * mask[:, None]).astype(columns.weight.dtype)


def _linear_loss_forward(
    objective: Objective,
    vocab_size: int,
    cap: float | None,
    chunk_tokens: int,
    hidden_ND: jax.Array,
    weight: jax.Array,
    numbers: jax.Array,
    tokens: tuple[jax.Array, jax.Array],
    teacher: Columns | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def step(weight_gradient: jax.Array, chunk: Chunk) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        loss, hidden, gradient = _chunk(objective, vocab_size, Columns(weight, numbers, cap), teacher, chunk)
        with jax.named_scope("head"):
            hidden_gradient = jnp.dot(gradient, weight.T, preferred_element_type=jnp.float32)
            weight_gradient += jnp.dot(hidden.T, gradient, preferred_element_type=jnp.float32)
        hidden_gradient = total(scattered(hidden_gradient, 0, *SHARDS), "tensor")
        return weight_gradient, (loss, hidden_gradient.astype(hidden.dtype))

    # The zero is multiplied in so that the carry varies over devices as the sums will.
    start = jnp.zeros(weight.shape, jnp.float32) + 0.0 * weight[0, 0].astype(jnp.float32)
    chunks = in_chunks((hidden_ND, *tokens), chunk_tokens)
    weight_gradient, (losses, hidden_gradient) = jax.lax.scan(step, start, chunks)
    hidden_gradient = hidden_gradient.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return jnp.sum(losses), (hidden_gradient, weight_gradient.astype(weight.dtype))


def _linear_loss_backward(
    objective: Objective,
    vocab_size: int,
    cap: float | None,
    chunk_tokens: int,
    gradients: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, None, None, None]:
    hidden_gradient, weight_gradient = gradients
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        (weight_gradient * cotangent).astype(weight_gradient.dtype),
        None,
        None,
        None,
    )


_linear_loss.defvjp(_linear_loss_forward, _linear_loss_backward)
