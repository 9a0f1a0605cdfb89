"""Gated Linear Attention (arXiv 2312.06635): a decay of its own for every channel of a key.

S_t = diag(a_t) S_{t-1} + k_t v_t',   o_t = S_t' q_t / sqrt(K),   a_t = sigmoid(W_2 W_1 x + b)^(1 / 16)
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Exact, Params, normal, zeros
from jaxhybrid.model.config import LinearConfig, ModelConfig, option
from jaxhybrid.model.layers import Linear, TokenContext
from jaxhybrid.model.mixers.linear import LinearMixer, logit, recurrence, slow_half_lives, zero_kernel

NORMALIZER = 16  # log a_t = logsigmoid(...) / NORMALIZER


@dataclass(frozen=True)
class GLAConfig(LinearConfig):
    """A GLA layer as in KL-guided layer selection (`gla_v1`): keys as wide as values, a decay of low rank."""

    kind = "gla"

    decay_rank: int = option(16, "rank of the projection that decides the decays")

    def __post_init__(self) -> None:
        if self.decay_rank < 1:
            raise ConfigError(f"mixer.decay_rank={self.decay_rank}: must be at least 1.")


class GLA(LinearMixer):
    Config = GLAConfig
    title = "Gated Linear Attention, arXiv 2312.06635"
    joins = True
    calibrates = ("decay", "gate")

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, GLAConfig)
        D, K, N, R = config.hidden_size, config.head_dim, config.num_states, mixer.decay_rank
        slow = mixer.decay_init == "slow"
        self.a_down_proj = Linear(rngs, (D, R), ("embed", None))
        self.a_up_proj = Linear(
            rngs, (R, N, K), (None, "kv_heads", "head_dim"), bias=True,
            init=zeros if slow else normal, bias_init=_slow_bias if slow else zeros, bias_kind=Exact,
        )  # fmt: skip

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        up = zero_kernel(own, "a_up_proj")["a_up_proj"]
        return own | {"a_up_proj": up | {"bias": jnp.broadcast_to(_half_life_bias(lives_N)[:, None], up["bias"].shape)}}

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        assert isinstance(config.mixer, GLAConfig)
        return [*super().describe(config), f"decays of rank {config.mixer.decay_rank}"]

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        q, k, v = self.projected(x_BTD, context)
        memory = None if state is None else state["memory"]
        out, memory = recurrence(q, k, v, *self.gates(x_BTD), context, memory)
        return self.gated_output(out, x_BTD), None if state is None else {"memory": memory}

    def gates(self, x_BTD: jax.Array) -> tuple[jax.Array, None]:
        """In float32: in 16 bits a slow decay rounds to no decay."""
        logits = self.a_up_proj(self.a_down_proj(x_BTD, dtype=jnp.float32), dtype=jnp.float32)
        return jax.nn.log_sigmoid(logits) / NORMALIZER, None


def _slow_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _half_life_bias(slow_half_lives(shape))


def _half_life_bias(lives: jax.Array) -> jax.Array:
    """What a_up_proj gives where its kernel gives zero; the bias' sigmoid is the decay of 16 tokens."""
    return logit(jnp.exp(-NORMALIZER * math.log(2.0) / lives))
