"""Heads side by side in lanes: a group of heads whose channels share an array of whole lanes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Lanes(NamedTuple):
    """One head of at least 128 channels, or two heads of which keys or values have fewer."""

    heads: int  # 1 or 2
    first: int  # head of the group
    dtype: Any  # of the operands of large products

    @property
    def group(self) -> int:
        """The group's number in a grid step's block."""
        return self.first // self.heads

    def own(self, x: jax.Array, head: int) -> jax.Array:
        """x [...,heads*width] with the channels of the group's other head zeroed."""
        if self.heads == 1:
            return x
        lane = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return jnp.where((lane < x.shape[-1] // 2) == (head == 0), x, 0)

    def of_block(self, width: int) -> slice:
        """The group's lanes in a grid step's block, width channels for each head."""
        return slice(self.first * width, (self.first + self.heads) * width)

    def odd(self, head: int) -> bool:
        return (self.first + head) % 2 == 1

    def stack(self, of_k: jax.Array, of_b: jax.Array, head: int) -> jax.Array:
        """What belongs to the columns k and b, one above the other: b first for even heads, k first for odd ones, so
        that the matrices which two neighbours invert lie in different lanes."""
        return jnp.concatenate([of_k, of_b] if self.odd(head) else [of_b, of_k], axis=0)

    def unstack(self, x: jax.Array, head: int) -> tuple[jax.Array, jax.Array]:
        """Undoes `stack`."""
        upper, lower = x[: x.shape[0] // 2], x[x.shape[0] // 2 :]
        return (upper, lower) if self.odd(head) else (lower, upper)

    def diagonal_blocks(self, state: jax.Array) -> jax.Array:
        """[heads*V,heads*K] with what relates one head's values to the other's keys zeroed."""
        if self.heads == 1:
            return state
        row = lax.broadcasted_iota(jnp.int32, state.shape, 0) < state.shape[0] // 2
        lane = lax.broadcasted_iota(jnp.int32, state.shape, 1) < state.shape[1] // 2
        return jnp.where(row == lane, state, 0)

    def spread(self, state: jax.Array) -> jax.Array:
        """[V,heads*K] -> [heads*V,heads*K], each head's state on the diagonal."""
        return self.diagonal_blocks(jnp.concatenate([state] * self.heads, axis=0))

    def gather(self, state: jax.Array) -> jax.Array:
        """Undoes `spread`."""
        V = state.shape[0] // self.heads
        return sum((state[i * V : (i + 1) * V] for i in range(1, self.heads)), state[:V])
