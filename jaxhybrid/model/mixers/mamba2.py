"""Mamba-2 (arXiv 2405.21060): its state-space duality is linear attention with a decay for each head and token.

C, B, x = silu(conv(q, k, v)),   d_t = softplus(dt_proj u + dt_bias),   a_t = exp(-exp(A_log) d_t)
S_t = a_t S_{t-1} + d_t B_t x_t',   y_t = S_t' C_t + D x_t,   out = o_proj(norm(y silu(z))),   z = g_proj u

From a teacher (arXiv 2408.15237): C is the query, B the key, x the value. Every state has a key of its own, which
Mamba-2 calls a group. The norm is over all heads together.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.model.blueprint import Exact, Params, normal, ones, weight, zeros
from jaxhybrid.model.config import MixerConfig, ModelConfig, option
from jaxhybrid.model.layers import Linear, TokenContext, WideRMSNorm
from jaxhybrid.model.mixers.delta import check_taps, convolution_in_words, convolution_state, qkv_convolutions
from jaxhybrid.model.mixers.linear import LinearMixer, half_life_steps, random_A_log, random_step_bias, recurrence


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """A Mamba-2 layer with as many channels as the teacher's attention has."""

    kind = "mamba2"

    ssm_conv_size: int = option(4, "taps of Mamba-2's convolution on q, k, v, which has a bias; 0 has none")

    def __post_init__(self) -> None:
        check_taps("ssm_conv_size", self.ssm_conv_size)


class Mamba2(LinearMixer):
    Config = Mamba2Config
    title = "Mamba-2, arXiv 2405.21060"
    state_heads: ClassVar[dict[str, int | None]] = LinearMixer.state_heads | {"q_conv": 2, "k_conv": 2, "v_conv": 2}

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, Mamba2Config)
        D, H, N, slow = config.hidden_size, config.num_heads, config.num_states, mixer.decay_init == "slow"
        self.dt_proj = Linear(rngs, (D, N), ("embed", "kv_heads"), init=zeros if slow else normal)
        self.A_log = weight(rngs, (N,), ("kv_heads",), zeros if slow else random_A_log, Exact)
        self.dt_bias = weight(rngs, (N,), ("kv_heads",), half_life_steps if slow else random_step_bias, Exact)
        self.D = weight(rngs, (H,), ("heads",), ones, Exact)
        self.conv_size = mixer.ssm_conv_size
        if self.conv_size:
            self.q_conv, self.k_conv, self.v_conv = qkv_convolutions(config, rngs, self.conv_size, bias=True)

    def add_output(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        mixer, D, H, K = config.mixer, config.hidden_size, config.num_heads, config.head_dim
        assert mixer is not None
        if mixer.output_gate:
            gate = zeros if mixer.gate_init == "zero" else normal
            self.g_proj = Linear(rngs, (D, H, K), ("embed", "heads", "head_dim"), init=gate)
        self.norm = WideRMSNorm(rngs, (H, K), "heads", config.norm_eps)

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """The memory, and the convolutions' last inputs."""
        state, mixer = LinearMixer.initial_state(config, batch, capacity, dtype), config.mixer
        assert isinstance(mixer, Mamba2Config)
        return state | convolution_state(config, batch, mixer.ssm_conv_size, dtype)

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        assert isinstance(config.mixer, Mamba2Config)
        states, *rest = super().describe(config)
        return [states, convolution_in_words(config.mixer.ssm_conv_size), *rest]

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        q, k, v = self.projected(x_BTD, context)
        before: Params = state or {}
        after: Params = {}
        if self.conv_size:
            q, after["q_conv"] = self.q_conv(q, context, before.get("q_conv"))
            k, after["k_conv"] = self.k_conv(k, context, before.get("k_conv"))
            v, after["v_conv"] = self.v_conv(v, context, before.get("v_conv"))
        q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
        # In float32: in 16 bits a slow decay rounds to no decay.
        steps = jax.nn.softplus(self.dt_proj(x_BTD, dtype=jnp.float32) + self.dt_bias[...])
        log_decay = -jnp.exp(self.A_log[...]) * steps
        written = (k * steps[..., None]).astype(k.dtype)
        out, after["memory"] = recurrence(q, written, v, log_decay, None, context, before.get("memory"), scale=1.0)
        past = jnp.repeat(v, out.shape[2] // v.shape[2], axis=2)
        out = out + (past * self.D[...][:, None]).astype(out.dtype)
        if hasattr(self, "g_proj"):
            out = out * jax.nn.silu(self.g_proj(x_BTD))
        return self.o_proj(self.norm(out)), None if state is None else after
