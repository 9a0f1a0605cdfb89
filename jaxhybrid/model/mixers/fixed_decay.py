"""Linear attention with decays that no token and no training changes, one a head: RetNet, lightning attention.

S_t = a_n S_{t-1} + k_t v_t',   o_t = S_t' q_t / sqrt(K)

`form` decides what the two differ in:
  retnet     (arXiv 2307.08621)   a_n = 1 - 2^-(5 + n);             gate silu
  lightning  (arXiv 2501.08313)   a_n = exp(-2^(-8 (n + 1) / N));   SiLU on q, k and v; gate sigmoid
MiniMax-01 lets the exponents of lightning attention shrink with depth as well; here all layers have the same.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import LinearConfig, ModelConfig, option
from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.mixers.linear import LinearMixer, recurrence, slow_half_lives, zero_kernel
from jaxhybrid.model.partition import axis_index, axis_size, own_heads


@dataclass(frozen=True)
class FixedDecayConfig(LinearConfig):
    """A layer of RetNet (which rotates queries and keys: `rope`), or of lightning attention."""

    kind = "fixed_decay"

    form: Literal["lightning", "retnet"] = option(
        "lightning", "fixed decays, activations and gate as lightning attention or as RetNet has them"
    )


class FixedDecay(LinearMixer):
    Config = FixedDecayConfig
    title = "linear attention with fixed decays, arXiv 2307.08621, 2501.08313"

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, FixedDecayConfig)
        self.is_lightning, self.is_slow = mixer.form == "lightning", mixer.decay_init == "slow"
        self.states = config.num_states

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        assert isinstance(config.mixer, FixedDecayConfig)
        slow = ", half-lives of 64 to 4096 tokens" if config.mixer.decay_init == "slow" else ""
        return [*super().describe(config), f"the form of {config.mixer.form}{slow}"]

    @staticmethod
    def with_open_gate(own: Params, constant_D: jax.Array, config: ModelConfig) -> Params:
        assert isinstance(config.mixer, FixedDecayConfig)
        if config.mixer.form == "lightning":
            return own | zero_kernel(own, "g_proj")
        return LinearMixer.with_open_gate(own, constant_D, config)

    def gate(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(x) if self.is_lightning else jax.nn.silu(x)

    def log_decay(self) -> jax.Array:
        """[N] of this device's states, float32."""
        heads = jnp.arange(self.states, dtype=jnp.float32)
        if self.is_slow:
            decays = -math.log(2.0) / slow_half_lives((self.states,))
        elif self.is_lightning:
            decays = -jnp.exp2(-8 * (heads + 1) / self.states)
        else:
            decays = jnp.log1p(-jnp.exp2(-5 - heads))
        first = axis_index("tensor") * self.states // axis_size("tensor")
        return jax.lax.dynamic_slice_in_dim(decays, first, own_heads(self.states))

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        q, k, v = self.projected(x_BTD, context)
        if self.is_lightning:
            q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
        memory = None if state is None else state["memory"]
        out, memory = recurrence(q, k, v, self.log_decay(), None, context, memory)
        return self.gated_output(out, x_BTD), None if state is None else {"memory": memory}
