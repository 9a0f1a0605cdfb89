"""What a sequence takes in memory while it is generated, by its length: the teacher's and the hybrid's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.blueprint import count_parameters
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers import LINEAR_MIXERS, MIXERS
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.plan.planned import Planned

LENGTHS = (1024, 4096, 16384, 65536, 131072)


@dataclass(frozen=True)
class Serving:
    """Bytes of one sequence.

    Attributes:
        token: that a softmax layer adds for each token.
        state: of a converted layer, whatever the length.
        moved: of that, in a step: a linear layer's is read and written, that of a sliding window only read.
        softmax_layers, depth: of the hybrid.
        weights: of the hybrid in the run's compute dtype.
    """

    token: int
    state: int
    moved: int
    softmax_layers: int
    depth: int
    weights: int

    def teacher(self, length: int) -> int:
        return self.depth * self.token * length

    def hybrid(self, length: int) -> int:
        return self.softmax_layers * self.token * length + (self.depth - self.softmax_layers) * self.state

    @property
    def smaller_from(self) -> int:
        """The length from which on the hybrid takes no more memory than the teacher."""
        return -(-self.state // self.token)

    @property
    def faster_from(self) -> int:
        """The length from which on a step moves no more bytes: of a cache all is read."""
        return -(-self.moved // self.token)


def serving(planned: Planned) -> Serving:
    """Of a run's hybrid, in its compute dtype."""
    return serving_of(planned.hybrid, planned.config.dtype)


def serving_of(hybrid: ModelConfig, dtype: Any) -> Serving:
    """By what the mixers keep in decoding, keys and values in `dtype` and memories in float32."""
    one, two = (_state_bytes(FULL_ATTENTION, hybrid, length, dtype) for length in (1, 2))
    state = 0 if hybrid.mixer is None else _state_bytes(hybrid.mixer.kind, hybrid, 1, dtype)
    return Serving(
        token=two - one,
        state=state,
        moved=2 * state if hybrid.mixer is not None and hybrid.mixer.kind in LINEAR_MIXERS else state,
        softmax_layers=len(hybrid.softmax_layers),
        depth=hybrid.num_layers,
        weights=count_parameters(model_variables(hybrid)) * jnp.dtype(dtype).itemsize,
    )


def _state_bytes(kind: str, config: ModelConfig, capacity: int, dtype: Any) -> int:
    state = jax.eval_shape(lambda: MIXERS[kind].initial_state(config, 1, capacity, jnp.dtype(dtype)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def as_json(found: Serving, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """For programs."""
    return {
        "kv_bytes_per_token_and_softmax_layer": found.token,
        "state_bytes_per_linear_layer": found.state,
        "hybrid_weights_bytes": found.weights,
        "smaller_from_tokens": found.smaller_from,
        "faster_from_tokens": found.faster_from,
        "sequences": [
            {"tokens": length, "teacher_bytes": found.teacher(length), "hybrid_bytes": found.hybrid(length)}
            for length in lengths
        ],
    }
