"""Prompts with their answers, read by a model: how likely each answer is, and what greedy decoding says instead."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.head import Head, chosen, gathered, in_chunks, log_partition, most_likely, own_columns, own_tokens
from jaxhybrid.model.partition import BATCH_AXES, active_mesh, head_spec, on_shards, row_devices
from jaxhybrid.model.transformer import Model, hidden_states
from jaxhybrid.train.placement import place_rows

TOKENS_AT_ONCE = 512  # whose logits are held
NO_TOKEN = -1  # after the end of an answer
# (model, tokens [B,T], segment ids [B,T], softmax layers [L] or None, dtype) -> final hidden states [B,T,D]
States = Callable[[Model, jax.Array, jax.Array, Any, Any], jax.Array]


def softmax_states(model: Model, tokens: jax.Array, segment_ids: jax.Array, softmax: Any, dtype: Any) -> jax.Array:
    """Of the model as it is, or with a traced choice of softmax layers: see `hidden_states`."""
    return hidden_states(model, tokens, segment_ids, softmax=softmax, dtype=dtype)


def read_answers(
    model: Model,
    tokens: np.ndarray,
    places: np.ndarray,
    answers: np.ndarray,
    *,
    rows: int,
    dtype: Any,
    softmax: np.ndarray | None = None,
    states: States = softmax_states,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probability of each answer [n,Q], and the most likely tokens [n,Q,A] in place of its own.

    Args:
        model: on the active mesh, or without one on a single device.
        tokens: [n,T] texts, each from the start of its row, with all but the last token of its last answer.
        places: [n,Q] the last token before each answer.
        answers: [n,Q,A] tokens; after the end of an answer NO_TOKEN, and what is said there means nothing.
        rows: read at once, rounded up to a multiple of the devices; the last ones are filled up with earlier ones.
        softmax: [L] bool, traced: the softmax layers, as `states` has it; by default of an all-linear model that has
            both kinds.
        states: how the model is run.
    """
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else row_devices(mesh)
    rows = -(-rows // devices) * devices
    at = np.where(answers == NO_TOKEN, 0, places[..., None] + np.arange(answers.shape[2]))
    seen = np.arange(tokens.shape[1]) <= at.max((1, 2))[:, None]
    arrays = {"tokens": tokens, "segment_ids": seen.astype(np.int32), "at": at, "answers": answers}
    found = []
    for first in range(0, len(tokens), rows):
        numbers = np.arange(first, first + rows) % len(tokens)
        batch = {name: array[numbers] for name, array in arrays.items()}
        placed = batch if mesh.empty else place_rows(batch, mesh)
        found.append(jax.device_get(_read(model, placed, softmax, dtype, states)))
    likelihood, greedy = (np.concatenate(parts)[: len(tokens)] for parts in zip(*found))
    return likelihood, greedy


def is_answer(greedy: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether greedy decoding gives the whole answer: [...] of tokens [...,A]."""
    return ((greedy == answers) | (answers == NO_TOKEN)).all(-1)


@partial(jax.jit, static_argnames=("dtype", "states"))
def _read(
    model: Model, batch: dict[str, jax.Array], softmax: Any, dtype: Any, states: States
) -> tuple[jax.Array, jax.Array]:
    hidden, head = states(model, batch["tokens"], batch["segment_ids"], softmax, dtype), model.head
    vocab_size, rows = model.config.vocab_size, P(BATCH_AXES)

    def read(hidden: jax.Array, at: jax.Array, answers: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
        taken = jnp.take_along_axis(hidden, at.reshape(len(at), -1, 1), axis=1).reshape(-1, hidden.shape[-1])
        columns = own_columns(head, vocab_size, dtype)

        def some(places: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            states, answer = map(gathered, places)
            logits = columns.logits(states, vocab_size)  # exact: rounded ones tie, and the lower token wins a tie
            log_p = chosen(logits, columns.numbers, answer) - log_partition(logits)
            return own_tokens(log_p), own_tokens(most_likely(logits, columns.numbers))

        chunks = in_chunks((taken, answers.reshape(-1)), TOKENS_AT_ONCE)
        log_p, greedy = (x.reshape(-1)[: answers.size] for x in jax.lax.map(some, chunks))
        likelihood = jnp.where(answers == NO_TOKEN, 0.0, log_p.reshape(answers.shape)).sum(-1)
        return likelihood, greedy.reshape(answers.shape)

    arguments = hidden, batch["at"], batch["answers"], head
    found = on_shards(read, arguments, (rows, rows, rows, head_spec(*head.shape)), (rows, rows))
    return found if active_mesh() is None else jax.tree.map(lambda x: jax.reshard(x, P()), found)
