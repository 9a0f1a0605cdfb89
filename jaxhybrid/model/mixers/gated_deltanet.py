"""Gated DeltaNet (arXiv 2412.06464) as in Qwen3.5's linear layer, with a teacher's biases and norms where it has them.

S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t',   o_t = S_t' q_t / sqrt(K)
a_t = exp(-exp(A_log) softplus(a_proj x + dt_bias)),   b_t = sigmoid(b_proj x)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import context_short_convolution, short_convolution

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Exact, Params, normal, weight, zeros
from jaxhybrid.model.config import MixerConfig, ModelConfig, option
from jaxhybrid.model.layers import Linear, TokenContext
from jaxhybrid.model.mixers.linear import LinearMixer, inverse_softplus, recurrence, slow_half_lives
from jaxhybrid.model.partition import own_heads

L2_EPS = 1e-6  # inside the square root, so that the gradient at a zero row is finite


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """A Gated DeltaNet layer in the form that Qwen3.5's linear layer can express."""

    kind = "gated_deltanet"

    conv_size: int = option(0, "taps of the causal short convolution on q, k, v; 0 has none")

    def __post_init__(self) -> None:
        if self.conv_size < 0 or self.conv_size == 1:
            raise ConfigError(f"mixer.conv_size={self.conv_size}: use 0 for no convolution, or at least 2 taps.")


class GatedDeltaNet(LinearMixer):
    Config = GatedDeltaNetConfig
    title = "Gated DeltaNet, arXiv 2412.06464"
    state_heads: ClassVar[dict[str, int]] = LinearMixer.state_heads | {"q_conv": 2, "k_conv": 2, "v_conv": 2}

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, GatedDeltaNetConfig)
        D, H, N, slow = config.hidden_size, config.num_heads, config.num_states, mixer.decay_init == "slow"
        self.a_proj = Linear(rngs, (D, N), ("embed", "kv_heads"), init=zeros if slow else normal)
        self.b_proj = Linear(rngs, (D, N), ("embed", "kv_heads"))
        self.A_log = weight(rngs, (N,), ("kv_heads",), zeros if slow else _random_A_log, Exact)
        self.dt_bias = weight(rngs, (N,), ("kv_heads",), _half_life_bias if slow else _random_step_bias, Exact)
        self.conv_size = mixer.conv_size
        if mixer.conv_size:
            self.q_conv, self.k_conv, self.v_conv = (
                ShortConvolution(rngs, (mixer.conv_size, heads, config.head_dim), axis)
                for heads, axis in ((H, "heads"), (N, "kv_heads"), (N, "kv_heads"))
            )

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """The memory, and the convolutions' last inputs."""
        state, mixer, N = LinearMixer.initial_state(config, batch, capacity, dtype), config.mixer, config.num_states
        assert isinstance(mixer, GatedDeltaNetConfig)
        if mixer.conv_size:
            for name, heads in (("q_conv", config.num_heads), ("k_conv", N), ("v_conv", N)):
                state[name] = jnp.zeros((batch, mixer.conv_size - 1, own_heads(heads) * config.head_dim), dtype)
        return state

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        assert isinstance(config.mixer, GatedDeltaNetConfig)
        taps = config.mixer.conv_size
        states, *rest = super().describe(config)
        return [states, f"convolution of {taps} taps" if taps else "no convolution", *rest]

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

        # Gates in float32: in 16 bits a slow decay rounds to no decay.
        a, b = self.a_proj(x_BTD, dtype=jnp.float32), self.b_proj(x_BTD, dtype=jnp.float32)
        log_decay = -jnp.exp(self.A_log[...]) * jax.nn.softplus(a + self.dt_bias[...])
        out, after["memory"] = recurrence(
            q, k, v, log_decay, jax.nn.sigmoid(b), context, before.get("memory"), norm_eps=L2_EPS
        )
        return self.gated_output(out, x_BTD), None if state is None else after


class ShortConvolution(nnx.Module):
    """A causal depthwise convolution over the last tokens of a document, one filter [taps] a channel."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int, int], heads_axis: str):
        self.taps = weight(rngs, shape, (None, heads_axis, "head_dim"), _identity_taps)

    def __call__(self, x_BTHK: jax.Array, context: TokenContext, last: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """y [B,T,H,K], and the last inputs [B,taps-1,H*K] that the next call needs."""
        B, T, H, K = x_BTHK.shape
        convolve = short_convolution
        if context.first_token is not None:
            convolve = partial(context_short_convolution, axis_name="context")
        y, last = convolve(
            x_BTHK.reshape(B, T, H * K), self.taps[...].reshape(-1, H * K), context.segment_ids, last
        )  # fmt: skip
        return y.reshape(B, T, H, K), last


# --- initial values that are not plain zeros, ones or normals


def _random_A_log(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log A with A uniform in (0, 16), as Mamba-2 and fla draw it."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-3, 16.0))


def _random_step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bias whose softplus is log-uniform in [0.001, 0.1], as Mamba-2 and fla draw it."""
    return inverse_softplus(jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1))))


def _half_life_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bias that gives the half-lives of `slow_half_lives`, with A_log and a_proj zero."""
    return inverse_softplus(math.log(2.0) / slow_half_lives(shape[-1]))


def _identity_taps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The convolution passes its current token through: only the last tap is one."""
    return jnp.zeros(shape, jnp.float32).at[-1].set(1.0)
