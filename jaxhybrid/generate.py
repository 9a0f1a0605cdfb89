"""Text from a model: prefill, then one compiled step per token on the hybrid state."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.model.decode import decode, initial_decode_state
from jaxhybrid.model.partition import BATCH_AXES, on_shards, row_devices, rows_sharding
from jaxhybrid.model.transformer import Model


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    dtype: Any = jnp.float32,
    length_multiple: int = 1,
) -> list[list[int]]:
    """New tokens for each prompt, up to and including an end token.

    Prompts of different lengths are padded on the left, to a multiple of `length_multiple` (fewer lengths, fewer
    compilations); the result is that of each prompt alone. Temperature 0 is greedy. With a mesh active the prompts are
    split over its devices.

    Raises:
        DataError: a prompt is empty, or holds a token outside the vocabulary.
        ConfigError: max_new_tokens or temperature is out of range.
    """
    if not prompts:
        return []
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: ask for at least 1.")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: use 0 for greedy or a positive value.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(
                f"Prompt {number} is empty; give it at least one token (the model's start or end token, say)."
            )
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            worst = min(prompt) if min(prompt) < 0 else max(prompt)
            raise DataError(f"Prompt {number} has token {worst}; the vocabulary has {model.config.vocab_size}.")
    mesh = jax.sharding.get_mesh()
    devices = 1 if mesh.empty else row_devices(mesh)
    rows = -(-len(prompts) // devices) * devices
    longest = -(-max(len(prompt) for prompt in prompts) // length_multiple) * length_multiple
    tokens = np.zeros((rows, longest), np.int32)
    mask = np.zeros_like(tokens)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    batch = (tokens, mask, np.arange(rows))
    produced = _generate(
        model,
        batch if mesh.empty else jax.device_put(batch, rows_sharding(mesh)),
        jax.random.key(seed),
        steps=max_new_tokens,
        temperature=float(temperature),
        eos_ids=tuple(eos_ids),
        dtype=dtype,
    )
    return [_until_end(row, eos_ids) for row in np.asarray(produced)[: len(prompts)].tolist()]


@partial(jax.jit, static_argnames=("steps", "temperature", "eos_ids", "dtype"))
def _generate(
    model: Model,
    batch: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
    *,
    steps: int,
    temperature: float,
    eos_ids: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """[B,steps] new tokens of `batch`: tokens, their mask, and a number for each row, by which its noise is drawn.

    Ends as soon as every row has produced an end token; the rest stays -1.
    """
    tokens_BT, mask_BT, rows_B = batch
    keys = jax.random.split(key, steps)

    def choose(logits: jax.Array, step: Any) -> jax.Array:
        def own(logits: jax.Array, rows: jax.Array, key: jax.Array) -> jax.Array:
            if temperature == 0.0:
                return jnp.argmax(logits, -1).astype(jnp.int32)
            noise = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
            return jax.vmap(jax.random.categorical)(noise, logits / temperature).astype(jnp.int32)

        return on_shards(own, (logits, rows_B, keys[step]), (P(BATCH_AXES), P(BATCH_AXES), P()), P(BATCH_AXES))

    def ended(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(token, bool)

    state = initial_decode_state(model.config, len(tokens_BT), tokens_BT.shape[1] + steps, dtype)
    logits, state = decode(model, tokens_BT, state, mask_BT, dtype=dtype)
    token = choose(logits, 0)
    nothing = jnp.full((1, steps), -1, jnp.int32) + 0 * rows_B[:, None]
    produced = jax.lax.dynamic_update_slice_in_dim(nothing, token[:, None], 0, 1)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        step, _, finished, *_ = carry
        return (step < steps) & ~jnp.all(finished)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, finished, produced, state = carry
        logits, state = decode(model, token[:, None], state, dtype=dtype)
        token = choose(logits, step)
        produced = jax.lax.dynamic_update_slice_in_dim(produced, token[:, None], step, 1)
        return step + 1, token, finished | ended(token), produced, state

    return jax.lax.while_loop(unfinished, advance, (jnp.int32(1), token, ended(token), produced, state))[3]


def _until_end(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    kept = []
    for token in tokens:
        if token < 0:
            break
        kept.append(token)
        if token in eos_ids:
            break
    return kept
