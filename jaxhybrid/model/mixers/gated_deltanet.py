"""Gated DeltaNet (arXiv 2412.06464) as in Qwen3.5's linear layer, with a teacher's biases and norms where it has them.

S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t',   o_t = S_t' q_t / sqrt(K)
a_t = exp(-exp(A_log) softplus(a_proj x + dt_bias)),   b_t = sigmoid(b_proj x)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import Steps

from jaxhybrid.model.blueprint import Exact, Params, normal, weight, zeros
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.layers import Linear
from jaxhybrid.model.mixers.delta import DeltaRule, DeltaRuleConfig
from jaxhybrid.model.mixers.linear import half_life_steps, random_A_log, random_step_bias, steps_of, zero_kernel


@dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaRuleConfig):
    """A Gated DeltaNet layer in the form that Qwen3.5's linear layer can express."""

    kind = "gated_deltanet"


class GatedDeltaNet(DeltaRule):
    Config = GatedDeltaNetConfig
    title = "Gated DeltaNet, arXiv 2412.06464"
    joins = True

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, GatedDeltaNetConfig)
        D, N, slow = config.hidden_size, config.num_states, mixer.decay_init == "slow"
        self.a_proj = Linear(rngs, (D, N), ("embed", "kv_heads"), init=zeros if slow else normal)
        self.b_proj = self.write_strengths(config, rngs)
        self.A_log = weight(rngs, (N,), ("kv_heads",), zeros if slow else random_A_log, Exact)
        self.dt_bias = weight(rngs, (N,), ("kv_heads",), half_life_steps if slow else random_step_bias, Exact)
        self.add_convolutions(config, rngs)

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        steps = {"A_log": jnp.zeros_like(own["A_log"]), "dt_bias": steps_of(lives_N)}
        return own | zero_kernel(own, "a_proj") | steps

    def log_decay(self, x_BTD: jax.Array) -> jax.Array:
        steps = jax.nn.softplus(self.a_proj(x_BTD, dtype=jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.A_log[...]) * steps

    def token_gates(self, firsts: dict[str, int], x_BTD: jax.Array) -> Steps:
        return Steps(firsts["a_proj"], firsts["b_proj"], self.A_log[...], self.dt_bias[...])
