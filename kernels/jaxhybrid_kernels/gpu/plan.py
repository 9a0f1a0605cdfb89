"""Everything static about one call of the Hopper kernels."""

from typing import Any, NamedTuple

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
    spans: int = 1  # of chunks, side by side, see spans.py

    def query_head(self, head: jax.Array) -> jax.Array:
        return lax.div(head, jnp.int32(self.N // self.Hq))

    def key_head(self, head: jax.Array) -> jax.Array:
        return lax.div(head, jnp.int32(self.N // self.Hk))

    def chunks_of(self, span: jax.Array) -> tuple[Any, Any]:
        """(first chunk, chunk after the last one); spans differ by one chunk at most."""
        if self.spans == 1:
            return 0, self.n
        begin, end = (lax.div(index * jnp.int32(self.n), jnp.int32(self.spans)) for index in (span, span + 1))
        return begin, end

    @property
    def padding(self) -> int:
        """Tokens added at the end to fill the last chunk."""
        return self.n * CHUNK - self.T

    @property
    def matrices(self) -> int:
        """Per chunk: the pair matrix, and the inverse for the delta rule."""
        return 2 if self.delta else 1
