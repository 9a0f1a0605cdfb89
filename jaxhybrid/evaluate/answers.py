"""Prompts with their answers, read by a model: how likely each answer is, and what greedy decoding says instead."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.layers import exact_dtype
from jaxhybrid.model.partition import gather, per_example
from jaxhybrid.model.transformer import Model, head_matrix, hidden_states
from jaxhybrid.train.placement import place_batch

TOKENS_AT_ONCE = 512  # whose logits are held
NO_TOKEN = -1  # after the end of an answer


def read_answers(
    model: Model, tokens: np.ndarray, places: np.ndarray, answers: np.ndarray, *, rows: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probability of each answer [n,Q], and the most likely tokens [n,Q,A] in place of its own.

    Args:
        model: on the active mesh, or without one on a single device.
        tokens: [n,T] texts, each from the start of its row, with all but the last token of its last answer.
        places: [n,Q] the last token before each answer.
        answers: [n,Q,A] tokens; after the end of an answer NO_TOKEN, and what is said there means nothing.
        rows: read at once, rounded up to a multiple of the devices; the last ones are filled up with earlier ones.
    """
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else mesh.size
    rows = -(-rows // devices) * devices
    at = np.where(answers == NO_TOKEN, 0, places[..., None] + np.arange(answers.shape[2]))
    seen = np.arange(tokens.shape[1]) <= at.max((1, 2))[:, None]
    arrays = {"tokens": tokens, "segment_ids": seen.astype(np.int32), "at": at, "answers": answers}
    found = []
    for first in range(0, len(tokens), rows):
        numbers = np.arange(first, first + rows) % len(tokens)
        own = np.split(numbers, jax.process_count())[jax.process_index()]
        batch = {name: array[own] for name, array in arrays.items()}
        found.append(jax.device_get(_read(model, batch if mesh.empty else place_batch(batch, mesh), dtype)))
    likelihood, greedy = (np.concatenate(parts)[: len(tokens)] for parts in zip(*found))
    return likelihood, greedy


def is_answer(greedy: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether greedy decoding gives the whole answer: [...] of tokens [...,A]."""
    return ((greedy == answers) | (answers == NO_TOKEN)).all(-1)


@partial(jax.jit, static_argnames="dtype")
def _read(model: Model, batch: dict[str, jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array]:
    hidden = hidden_states(model.params, model.config, batch["tokens"], batch["segment_ids"], dtype=dtype)
    head = gather(head_matrix(model.params, model.config).astype(dtype))

    def read(hidden: jax.Array, at: jax.Array, answers: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = jnp.take_along_axis(hidden, at.reshape(len(at), -1, 1), axis=1).reshape(-1, hidden.shape[-1])

        def one(place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            state, answer = place  # logits are exact: rounded ones tie, and the lower token wins a tie
            logits = jnp.dot(state, head, preferred_element_type=exact_dtype(state.dtype))
            return jax.nn.log_softmax(logits)[answer], jnp.argmax(logits)

        log_p, greedy = jax.lax.map(one, (states, answers.reshape(-1)), batch_size=TOKENS_AT_ONCE)
        likelihood = jnp.where(answers == NO_TOKEN, 0.0, log_p.reshape(answers.shape)).sum(-1)
        return likelihood, greedy.reshape(answers.shape)

    return gather(per_example(read, hidden, batch["at"], batch["answers"], whole=(head,)))
