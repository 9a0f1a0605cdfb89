"""Mamba-2 (arXiv 2405.21060): its state-space duality is linear attention with a decay for each head and token.

C, B, x = silu(conv(q, k, v)),   d_t = softplus(dt_proj u + dt_bias),   a_t = exp(-exp(A_log) d_t)
S_t = a_t S_{t-1} + d_t B_t x_t',   y_t = S_t' C_t + D x_t,   out = o_proj(norm(y silu(z))),   z = g_proj u

From a teacher (arXiv 2408.15237): C is the query, B the key, x the value. Every state has a key of its own, which
Mamba-2 calls a group. The norm is over all heads together, or over each (`head_norm`): servers have the latter.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.model.blueprint import Exact, Params, normal, ones, weight, zeros
from jaxhybrid.model.config import LinearConfig, ModelConfig, option
from jaxhybrid.model.layers import Linear, TokenContext, WideRMSNorm
from jaxhybrid.model.mixers.delta import Convolved, check_taps
from jaxhybrid.model.mixers.linear import (
    half_life_steps,
    random_A_log,
    random_step_bias,
    recurrence,
    steps_of,
    zero_kernel,
)


@dataclass(frozen=True)
class Mamba2Config(LinearConfig):
    """A Mamba-2 layer with as many channels as the teacher's attention has."""

    kind = "mamba2"

    ssm_conv_size: int = option(4, "taps of Mamba-2's convolution on q, k, v, which has a bias; 0 has none")
    head_norm: bool = option(False, "normalise each head by itself, as servers' Mamba-2; false: all heads together")

    def __post_init__(self) -> None:
        check_taps("ssm_conv_size", self.ssm_conv_size)


class Mamba2(Convolved):
    Config = Mamba2Config
    title = "Mamba-2, arXiv 2405.21060"
    calibrates = ("decay", "gate")

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, Mamba2Config)
        D, H, N, slow = config.hidden_size, config.num_heads, config.num_states, mixer.decay_init == "slow"
        self.dt_proj = Linear(rngs, (D, N), ("embed", "kv_heads"), init=zeros if slow else normal)
        self.A_log = weight(rngs, (N,), ("kv_heads",), zeros if slow else random_A_log, Exact)
        self.dt_bias = weight(rngs, (N,), ("kv_heads",), half_life_steps if slow else random_step_bias, Exact)
        self.D = weight(rngs, (H,), ("heads",), ones, Exact)
        self.add_convolutions(config, rngs, bias=True)

    def add_output(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        assert isinstance(config.mixer, Mamba2Config)
        self.add_gate(config, rngs)
        shape, by_head = (config.num_heads, config.head_dim), config.mixer.head_norm
        self.norm = WideRMSNorm(rngs, shape, "heads", config.norm_eps, by_head)

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        steps = {"A_log": jnp.zeros_like(own["A_log"]), "dt_bias": steps_of(lives_N)}
        return own | zero_kernel(own, "dt_proj") | steps

    @staticmethod
    def taps(config: ModelConfig) -> int:
        assert isinstance(config.mixer, Mamba2Config)
        return config.mixer.ssm_conv_size

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        before: Params = state or {}
        (q, k, v), after = self.convolved(x_BTD, context, before)
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
