"""How the next token is chosen from logits: greedy, or drawn, after the filters that transformers has in its order.

All settings are arrays with a value for each row, so that one program serves every choice of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens of one text are chosen. The defaults are greedy decoding.

    A text's noise follows its seed and the place of the token, whatever else is in the batch.

    Raises:
        ConfigError: a value is out of its range.
    """

    temperature: float = 0.0  # 0: the most likely token; the filters below then change nothing but the penalty
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together reach this probability
    min_p: float = 0.0  # only tokens at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # divides positive logits of tokens that occurred, multiplies negative ones
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "use 0 for greedy or a positive value"),
            "top_k": (0 <= self.top_k < 2**31, "use 0 for all tokens or a positive count below 2^31"),
            "top_p": (0 < self.top_p <= 1, "use a probability in (0, 1]; 1 keeps all tokens"),
            "min_p": (0 <= self.min_p <= 1, "use a share in [0, 1]; 0 keeps all tokens"),
            "repetition_penalty": (self.repetition_penalty > 0, "use a positive value; 1 is none"),
            "seed": (0 <= self.seed < 2**32, "use an integer from 0 to 2^32 - 1"),
        }
        for name, (is_right, advice) in checks.items():
            if not is_right:
                raise ConfigError(f"{name}={getattr(self, name)}: {advice}.")


class SamplingRows(NamedTuple):
    """`Sampling` of each row: arrays [B]."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray


def in_rows(settings: Sequence[Sampling]) -> SamplingRows:
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    names = [field.name for field in fields(Sampling)]
    return SamplingRows(*(np.array([getattr(s, n) for s in settings], dtypes.get(n, np.float32)) for n in names))


def choose(
    logits: jax.Array, rows: SamplingRows, places: jax.Array, seen: jax.Array | None, *, drawn: bool
) -> jax.Array:
    """The next token of each row, [B] int32.

    Args:
        logits: [B,S] float32.
        places: [B] int32, the token's place in its text.
        seen: [B,S] bool, tokens that occurred; None where no row has a repetition penalty.
        drawn: whether a row may have a temperature; without one a program needs no order of the logits.
    """
    if seen is not None:
        logits = penalized(logits, rows.repetition_penalty, seen)
    greedy = jnp.argmax(logits, -1).astype(jnp.int32)
    if not drawn:
        return greedy

    def draw(logits: jax.Array, seed: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), place), logits)

    token = jax.vmap(draw)(filtered(logits, rows), jnp.asarray(rows.seed), places)
    return jnp.where(rows.temperature > 0, token.astype(jnp.int32), greedy)


def penalized(logits: jax.Array, penalty: jax.Array | np.ndarray, seen: jax.Array) -> jax.Array:
    """The repetition penalty of CTRL (arXiv 1909.05858), once for each token that occurred."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits at each row's temperature, -inf where a filter drops a token: top-k, then top-p of the rest, then min-p.

    Of tokens as likely as the last one that a filter keeps all are kept.
    """
    S = logits.shape[-1]
    temperature, top_k, top_p, min_p = (x[:, None] for x in rows[:4])
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, S), S)
    kth = jnp.take_along_axis(ordered, count - 1, axis=-1)
    kept = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(kept, axis=-1) - kept  # the probability of all tokens before this one
    last = jnp.sum((likelier < top_p) & (kept > 0), axis=-1, keepdims=True) - 1
    lowest = jnp.where(top_p < 1, jnp.take_along_axis(ordered, jnp.maximum(last, 0), axis=-1), kth)
    lowest = jnp.maximum(lowest, ordered[:, :1] + jnp.log(min_p))
    return jnp.where(logits >= lowest, logits, -jnp.inf)
