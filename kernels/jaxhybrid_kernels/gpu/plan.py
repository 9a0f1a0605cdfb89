"""Everything static about one call of the Hopper kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64  # tokens
BLOCK = 64  # rows of the transposed state [V,K] that one warpgroup holds


class Plan(NamedTuple):
    B: int
    T: int
    n: int  # chunks
    Hq: int
    Hk: int
    N: int
    K: int
    V: int
    scale: float
    delta: bool
    started: bool  # with an initial state other than zero
    blocks: int  # consumer warpgroups per thread block
    fused: bool  # the recurrences make their own matrices, see recurrence.py
    interpret: bool
    per_channel: bool = False  # the decays

    def query_head(self, head: jax.Array) -> jax.Array:
        return lax.div(head, jnp.int32(self.N // self.Hq))

    def key_head(self, head: jax.Array) -> jax.Array:
        return lax.div(head, jnp.int32(self.N // self.Hk))

    @property
    def padding(self) -> int:
        """Tokens added at the end to fill the last chunk."""
        return self.n * CHUNK - self.T

    @property
    def matrices(self) -> int:
        """Per chunk: the pair matrix, and the inverse for the delta rule."""
        return 2 if self.delta else 1
