"""Kimi delta attention (arXiv 2510.26692): the delta rule with a decay of its own for every channel of a key.

S_t = (I - b_t k_t k_t') diag(a_t) S_{t-1} + b_t k_t v_t',   o_t = S_t' q_t / sqrt(K)
a_t = exp(-exp(A_log) softplus(a_up a_down x + dt_bias)),   b_t = sigmoid(b_proj x)
y = o_proj(norm(o) * sigmoid(g_up g_down x))
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Exact, Params, normal, weight, zeros
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.layers import Linear, RMSNorm
from jaxhybrid.model.mixers.delta import DeltaRule, DeltaRuleConfig
from jaxhybrid.model.mixers.linear import (
    check_low_rank,
    half_life_steps,
    low_rank_option,
    random_A_log,
    random_step_bias,
    steps_of,
    zero_kernel,
)


@dataclass(frozen=True)
class KimiDeltaConfig(DeltaRuleConfig):
    """A layer as in Kimi Linear, which has a convolution of 4 taps and low ranks as wide as a head."""

    kind = "kimi_delta"

    low_rank: int | None = low_rank_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_low_rank(self.low_rank)
        if self.gate_init == "value":
            raise ConfigError("mixer.gate_init='value': the gate of kimi_delta is of low rank and cannot be v_proj.")


class KimiDelta(DeltaRule):
    Config = KimiDeltaConfig
    title = "Kimi delta attention, arXiv 2510.26692"

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, KimiDeltaConfig)
        D, K, N, R, slow = *_sizes(config), mixer.decay_init == "slow"
        per_state = ("kv_heads", "head_dim")
        self.a_down_proj = Linear(rngs, (D, R), ("embed", None))
        self.a_up_proj = Linear(rngs, (R, N, K), (None, *per_state), init=zeros if slow else normal)
        self.b_proj = self.write_strengths(config, rngs)
        self.A_log = weight(rngs, (N,), ("kv_heads",), zeros if slow else random_A_log, Exact)
        self.dt_bias = weight(rngs, (N, K), per_state, half_life_steps if slow else random_step_bias, Exact)
        self.add_convolutions(config, rngs)

    def add_output(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        mixer, (D, K, _, R), H = config.mixer, _sizes(config), config.num_heads
        assert isinstance(mixer, KimiDeltaConfig)
        self.o_norm = RMSNorm(rngs, K, "head_dim", config.norm_eps)
        if mixer.output_gate:
            up = zeros if mixer.gate_init == "zero" else normal
            self.g_down_proj = Linear(rngs, (D, R), ("embed", None))
            self.g_up_proj = Linear(rngs, (R, H, K), (None, "heads", "head_dim"), bias=True, init=up)

    def gated_output(self, out_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        out = self.o_norm(out_BTHK)
        if hasattr(self, "g_up_proj"):
            out = out * jax.nn.sigmoid(self.g_up_proj(self.g_down_proj(x_BTD)))
        return self.o_proj(out)

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        bias = jnp.broadcast_to(steps_of(lives_N)[:, None], own["dt_bias"].shape)
        return own | zero_kernel(own, "a_up_proj") | {"A_log": jnp.zeros_like(own["A_log"]), "dt_bias": bias}

    @staticmethod
    def with_open_gate(own: Params, constant_D: jax.Array, config: ModelConfig) -> Params:
        return own | zero_kernel(own, "g_up_proj")

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        return [*super().describe(config), f"decays and gate of rank {_sizes(config)[-1]}"]

    def log_decay(self, x_BTD: jax.Array) -> jax.Array:
        logits = self.a_up_proj(self.a_down_proj(x_BTD, dtype=jnp.float32), dtype=jnp.float32)
        return -jnp.exp(self.A_log[...])[:, None] * jax.nn.softplus(logits + self.dt_bias[...])


def _sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    """D, K, N and the low rank R."""
    assert isinstance(config.mixer, KimiDeltaConfig)
    return config.hidden_size, config.head_dim, config.num_states, config.mixer.low_rank or config.head_dim
