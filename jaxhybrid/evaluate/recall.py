"""Key-value recall: read a list of names and numbers, then say one name's number again.

What a linear layer's fixed-size state is worst at and softmax layers are kept for. Synthetic text, any tokenizer, no
download. An answer counts when greedy decoding would give exactly its tokens.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.params import Params
from jaxhybrid.model.partition import gather, per_example
from jaxhybrid.model.transformer import Model, head_matrix, hidden_states
from jaxhybrid.train.placement import place_batch

NAMES = tuple(
    """
    amber anchor apple arrow autumn badge basket beacon birch blanket bottle branch bridge bronze bucket butter
    button candle canyon carpet castle cedar cherry circle cloud clover coffee copper coral cotton cradle crystal
    curtain dagger daisy desert diamond dolphin dragon eagle ember engine falcon feather fiddle flame forest fossil
    fountain garden garlic ginger glacier granite hammer harbor hazel helmet hollow honey horizon island ivory
    jacket jasmine jungle kettle ladder lantern lemon lily linen lizard magnet maple marble meadow mirror mountain
    needle nickel oasis ocean olive onion orange orchid otter oyster paddle palace paper parrot pebble pencil
    pepper pillow pirate planet pocket pottery puzzle rabbit ribbon river rocket saddle sailor salmon shadow silver
    spider spiral summer sunset table temple thistle thunder tiger timber tulip tunnel turtle valley velvet violet
    walnut willow window winter wolf
    """.split()  # noqa: SIM905 - a list this long reads better as text
)


def recall_prompts(tokenizer: Any, pairs: int, samples: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """`samples` seeded (prompt, answer) token lists, each with `pairs` names and four-digit numbers.

    Raises:
        ConfigError: more pairs than there are names.
        DataError: the tokenizer merges answers with the text before them.
    """
    if not 1 <= pairs <= len(NAMES):
        raise ConfigError(f"evaluate.recall pairs={pairs}: between 1 and {len(NAMES)}.")
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(samples):
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[:pairs]]
        numbers = [str(n) for n in rng.integers(1000, 10000, pairs)]
        asked = int(rng.integers(pairs))
        listing = "".join(f"The number of {name} is {number}.\n" for name, number in zip(names, numbers))
        # Question and answer are tokenised together, as a running text has them.
        question = listing + f"The number of {names[asked]} is"
        prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{question} {numbers[asked]}", add_special_tokens=False)["input_ids"]
        if whole[: len(prompt)] != prompt:
            raise DataError(
                "This tokenizer merges the probe's answer with its question; the recall probe does not apply."
            )
        prompts.append((prompt, whole[len(prompt) :]))
    return prompts


def recall_accuracy(
    model: Model,
    tokenizer: Any,
    pairs: int,
    samples: int,
    *,
    mesh: Mesh,
    batch_size: int = 16,
    seed: int = 0,
    dtype: Any = jnp.bfloat16,
) -> float:
    """Share of prompts whose whole answer is the model's greedy choice, token by token. The model is placed on `mesh`.

    Whole batches of `batch_size` prompts (rounded up to a multiple of the devices) run at once.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // devices) * devices
    prompts = recall_prompts(tokenizer, pairs, samples, seed)
    longest = -(-max(len(prompt) + len(answer) for prompt, answer in prompts) // 64) * 64  # kernels like round lengths
    answer_length = max(len(answer) for _, answer in prompts)
    right = 0
    for first in range(0, samples, batch_size):
        group = prompts[first : first + batch_size]
        tokens = np.zeros((batch_size, longest), np.int32)
        segments = np.zeros_like(tokens)
        places = np.zeros((batch_size, answer_length), np.int32)  # where each answer token is predicted
        answers = np.full((batch_size, answer_length), -1, np.int32)
        for row, (prompt, answer) in enumerate(group):
            text = [*prompt, *answer]
            tokens[row, : len(text)], segments[row, : len(text)] = text, 1
            places[row, : len(answer)] = np.arange(len(answer)) + len(prompt) - 1
            answers[row, : len(answer)] = answer
        batch = place_batch({"tokens": tokens, "segment_ids": segments, "places": places}, mesh)
        chosen = np.asarray(_greedy_at(model.params, batch, config=model.config, dtype=dtype))
        right += int(((chosen == answers) | (answers < 0)).all(axis=1)[: len(group)].sum())
    return right / samples


@partial(jax.jit, static_argnames=("config", "dtype"))
def _greedy_at(params: Params, batch: dict[str, jax.Array], *, config: ModelConfig, dtype: Any) -> jax.Array:
    """The most likely next token after each of `places` [B,A]."""
    hidden = hidden_states(params, config, batch["tokens"], batch["segment_ids"], dtype=dtype)
    head = gather(head_matrix(params, config).astype(dtype))

    def choose(hidden: jax.Array, places: jax.Array, head: jax.Array) -> jax.Array:
        at_places = jnp.take_along_axis(hidden, places[..., None], axis=1)
        return jnp.argmax(jnp.einsum("bad,ds->bas", at_places, head), axis=-1)

    return per_example(choose, hidden, batch["places"], whole=(head,))
