"""One call of `linear_attention`, as its implementations get it."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.norms import normalize_tokens
from jaxhybrid_kernels.numerics import split_axes, state_dtype
from jaxhybrid_kernels.validation import Sizes


class Call(NamedTuple):
    """Checked arguments."""

    inputs: Inputs
    initial_state: jax.Array | None
    scale: float
    chunk_size: int | None
    norm_eps: float | None
    sizes: Sizes

    def normalized(self) -> Self:
        """With q and k divided by their norms if that is asked for."""
        if self.norm_eps is None:
            return self
        q, k = (normalize_tokens(x, self.inputs.segment_ids, self.norm_eps) for x in self.inputs[:2])
        return self._replace(inputs=self.inputs._replace(q=q, k=k), norm_eps=None)

    def state(self) -> jax.Array:
        """The initial state in the state's dtype, zeros if none is given."""
        dtype = state_dtype(*self.inputs._replace(segment_ids=None), self.initial_state)
        if self.initial_state is not None:
            return self.initial_state.astype(dtype)
        return jnp.zeros((self.sizes.B, self.sizes.N, self.sizes.K, self.sizes.V), dtype)

    def split_refusal(self, implementation: str) -> str | None:
        """Of an implementation that runs on whole arrays."""
        if axes := split_axes(*self.inputs, self.initial_state):
            why = f"runs on whole arrays: they are split over {axes}; use jax.shard_map."
            return f"implementation={implementation!r} {why}"
        return None
