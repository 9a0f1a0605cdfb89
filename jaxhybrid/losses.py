"""The three losses: alignment, KL to the teacher, cross entropy.

The last two are *linear*: they take hidden states and an output head and never hold logits of a whole batch. Tokens go
through the head in chunks; each chunk's gradient is formed while its logits are at hand, so the backward pass has
nothing left to do but scale.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.partition import per_example

CHUNK_TOKENS = 2048  # logits at hand: CHUNK_TOKENS x vocabulary x 4 bytes, once for each model

# (logits [C,S] float32, what belongs to these tokens, what is shared) -> (summed loss, its gradient for the logits)
Objective = Callable[[jax.Array, Any, Any], tuple[jax.Array, jax.Array]]


def alignment_loss(target_BTD: jax.Array, output_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over unmasked tokens of ||target - output||_2 / sqrt(D) (RADLADS stage 1; the norm, not its square)."""
    difference = target_BTD.astype(jnp.float32) - output_BTD.astype(jnp.float32)
    # The tiny constant gives an exact match a gradient of zero instead of 0/0.
    distance_BT = jnp.sqrt(jnp.mean(difference * difference, axis=-1) + 1e-12)
    return jnp.sum(distance_BT * mask_BT)


def linear_kl(
    student_hidden_BTD: jax.Array,
    student_head_DS: jax.Array,
    teacher_hidden_BTD: jax.Array,
    teacher_head_DS: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
    """Sum over unmasked tokens of KL(teacher || student) over the whole vocabulary, a float32 scalar.

    Heads are given whole (not sharded) and may be padded to different widths: only their first `vocab_size` columns are
    words. The two hidden widths may differ. Differentiable in the student's arguments only.
    """
    widths = student_head_DS.shape[1], teacher_head_DS.shape[1]
    words = min(widths) if vocab_size is None else vocab_size
    if words > min(widths):
        raise ConfigError(f"vocab_size {words} exceeds a head: student has {widths[0]} columns, teacher {widths[1]}.")
    teacher_hidden_BTD, teacher_head_DS = jax.lax.stop_gradient((teacher_hidden_BTD, teacher_head_DS))
    return _summed_over_batch(
        _kl_objective,
        student_hidden_BTD,
        student_head_DS[:, :words],
        (teacher_hidden_BTD, mask_BT),
        teacher_head_DS[:, :words],
        chunk_tokens,
    )


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    head_DS: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> jax.Array:
    """Sum over unmasked tokens of -log p(target), a float32 scalar. The head is given whole."""
    return _summed_over_batch(_cross_entropy_objective, hidden_BTD, head_DS, (targets_BT, mask_BT), (), chunk_tokens)


def next_token_targets(tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(targets, mask) [B,T]: each token's successor, where it exists in the same document."""

    def shift(tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        return targets, ((segments == following) & (segments != 0)).astype(jnp.float32)

    return per_example(shift, tokens_BT, segment_ids_BT)


# --- objectives on one chunk of logits


def _logits(hidden_CD: jax.Array, head_DS: jax.Array) -> jax.Array:
    with jax.named_scope("head"):
        return jnp.dot(hidden_CD, head_DS, preferred_element_type=jnp.float32)


def _kl_objective(logits: jax.Array, tokenwise: Any, teacher_head: jax.Array) -> tuple[jax.Array, jax.Array]:
    teacher_hidden, mask = tokenwise
    teacher_logits = _logits(teacher_hidden, teacher_head)
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher_logits)
    p = jnp.exp(log_p)
    kl = jnp.sum(p * (log_p - log_q), axis=-1)
    return jnp.sum(kl * mask), (jnp.exp(log_q) - p) * mask[:, None]


def _cross_entropy_objective(logits: jax.Array, tokenwise: Any, _: Any) -> tuple[jax.Array, jax.Array]:
    targets, mask = tokenwise
    log_q = jax.nn.log_softmax(logits)
    chosen = jnp.arange(logits.shape[1])[None] == targets[:, None]
    return -jnp.sum(jnp.where(chosen, log_q, 0.0) * mask[:, None]), (jnp.exp(log_q) - chosen) * mask[:, None]


# --- the chunk walk they share


def _summed_over_batch(
    objective: Objective, hidden_BTD: jax.Array, head: jax.Array, tokenwise: Any, shared: Any, chunk_tokens: int
) -> jax.Array:
    leaves, tree = jax.tree.flatten(tokenwise)
    shared_leaves, shared_tree = jax.tree.flatten(shared)

    def local(hidden: jax.Array, *rest: jax.Array) -> jax.Array:
        tokens = hidden.shape[0] * hidden.shape[1]
        flat = [x.reshape(tokens, *x.shape[2:]) for x in (hidden, *rest[: len(leaves)])]
        head, *constants = rest[len(leaves) :]
        loss = _linear_loss(
            objective,
            chunk_tokens,
            flat[0],
            head,
            jax.tree.unflatten(tree, flat[1:]),
            jax.tree.unflatten(shared_tree, constants),
        )
        return loss[None]

    with jax.named_scope("loss"):
        return jnp.sum(per_example(local, hidden_BTD, *leaves, whole=(head, *shared_leaves)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(
    objective: Objective, chunk_tokens: int, hidden_ND: jax.Array, head: jax.Array, tokenwise: Any, shared: Any
) -> jax.Array:
    def chunk_loss(chunk: Any) -> jax.Array:
        hidden, own = chunk
        logits = _logits(hidden, head)
        return objective(logits, own, shared)[0]

    return jnp.sum(jax.lax.map(chunk_loss, _in_chunks((hidden_ND, tokenwise), chunk_tokens)))


def _linear_loss_forward(
    objective: Objective, chunk_tokens: int, hidden_ND: jax.Array, head: jax.Array, tokenwise: Any, shared: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def step(head_gradient: jax.Array, chunk: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, own = chunk
        logits = _logits(hidden, head)
        loss, gradient = objective(logits, own, shared)
        gradient = gradient.astype(head.dtype)
        with jax.named_scope("head"):
            hidden_gradient = jnp.dot(gradient, head.T, preferred_element_type=jnp.float32).astype(hidden.dtype)
            head_gradient += jnp.dot(hidden.T, gradient, preferred_element_type=jnp.float32)
        return head_gradient, (loss, hidden_gradient)

    # The zero is multiplied in so that under shard_map the carry varies over devices as the sums will.
    start = jnp.zeros(head.shape, jnp.float32) + 0.0 * hidden_ND[0, 0].astype(jnp.float32)
    chunks = _in_chunks((hidden_ND, tokenwise), chunk_tokens)
    head_gradient, (losses, hidden_gradient) = jax.lax.scan(step, start, chunks)
    hidden_gradient = hidden_gradient.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return jnp.sum(losses), (hidden_gradient, head_gradient.astype(head.dtype))


def _linear_loss_backward(
    objective: Objective, chunk_tokens: int, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden_gradient, head_gradient = gradients
    return (
        (hidden_gradient * cotangent).astype(hidden_gradient.dtype),
        (head_gradient * cotangent).astype(head_gradient.dtype),
        None,
        None,
    )


_linear_loss.defvjp(_linear_loss_forward, _linear_loss_backward)


def _in_chunks(arrays: Any, chunk_tokens: int) -> Any:
    """[N,...] -> [chunks, C, ...], zero-padded: padded tokens have mask 0."""

    def split(x: jax.Array) -> jax.Array:
        size = min(chunk_tokens, x.shape[0])
        chunks = math.ceil(x.shape[0] / size)
        x = jnp.pad(x, ((0, chunks * size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, arrays)
