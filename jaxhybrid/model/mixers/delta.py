"""What mixers with a delta rule share: SiLU, keys and queries of length one, write strengths, a short convolution.

S_t = (I - b_t k_t k_t') decay_t(S_{t-1}) + b_t k_t v_t',   o_t = S_t' q_t / sqrt(K),   b_t = sigmoid(b_proj x)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import context_short_convolution, short_convolution

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Params, weight, zeros
from jaxhybrid.model.config import LinearConfig, ModelConfig, option
from jaxhybrid.model.layers import Linear, TokenContext
from jaxhybrid.model.mixers.linear import LinearMixer, logit, recurrence
from jaxhybrid.model.partition import own_heads

L2_EPS = 1e-6  # inside the square root, so that the gradient at a zero row is finite


@dataclass(frozen=True)
class DeltaRuleConfig(LinearConfig):
    conv_size: int = option(0, "taps of the causal short convolution on q, k, v; 0 has none")

    def __post_init__(self) -> None:
        check_taps("conv_size", self.conv_size)


class Convolved(LinearMixer):
    """A mixer whose q, k and v go through SiLU, and through a short convolution before it where there are `taps`."""

    state_heads: ClassVar[dict[str, int | None]] = LinearMixer.state_heads | {"q_conv": 2, "k_conv": 2, "v_conv": 2}

    @staticmethod
    def taps(config: ModelConfig) -> int:
        raise NotImplementedError

    def add_convolutions(self, config: ModelConfig, rngs: nnx.Rngs, bias: bool = False) -> None:
        self.conv_size = self.taps(config)
        if self.conv_size:
            self.q_conv, self.k_conv, self.v_conv = qkv_convolutions(config, rngs, self.conv_size, bias)

    @classmethod
    def initial_state(cls, config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """The memory, and the convolutions' last inputs."""
        state = super().initial_state(config, batch, capacity, dtype)
        return state | convolution_state(config, batch, cls.taps(config), dtype)

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        states, *rest = super().describe(config)
        return [states, convolution_in_words(cls.taps(config)), *rest]

    def convolved(
        self, x_BTD: jax.Array, context: TokenContext, before: Params
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Params]:
        """(q, k, v) as the recurrence takes them, and the convolutions' part of the state after them."""
        q, k, v = self.projected(x_BTD, context)
        after: Params = {}
        if self.conv_size:
            q, after["q_conv"] = self.q_conv(q, context, before.get("q_conv"))
            k, after["k_conv"] = self.k_conv(k, context, before.get("k_conv"))
            v, after["v_conv"] = self.v_conv(v, context, before.get("v_conv"))
        return (jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)), after


class DeltaRule(Convolved):
    """A subclass declares its decays, then `write_strengths` and `add_convolutions`, and gives `log_decay`."""

    silu = True
    norm_eps = L2_EPS
    calibrates: ClassVar[tuple[str, ...]] = ("decay", "strength", "gate")
    b_proj: Linear

    def write_strengths(self, config: ModelConfig, rngs: nnx.Rngs) -> Linear:
        return Linear(rngs, (config.hidden_size, config.num_states), ("embed", "kv_heads"))

    @staticmethod
    def taps(config: ModelConfig) -> int:
        assert isinstance(config.mixer, DeltaRuleConfig)
        return config.mixer.conv_size

    @staticmethod
    def with_strengths(own: Params, strengths_N: jax.Array, constant_D: jax.Array) -> Params:
        kernel = constant_D[:, None] * logit(strengths_N)
        return own | {"b_proj": {"kernel": kernel.astype(own["b_proj"]["kernel"].dtype)}}

    def log_decay(self, x_BTD: jax.Array) -> jax.Array | None:
        """[B,T,N] or [B,T,N,K] in float32; None has no decay."""
        raise NotImplementedError

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        before: Params = state or {}
        (q, k, v), after = self.convolved(x_BTD, context, before)
        memory = before.get("memory")
        out, after["memory"] = recurrence(q, k, v, *self.gates(x_BTD), context, memory, norm_eps=self.norm_eps)
        return self.gated_output(out, x_BTD), None if state is None else after

    def gates(self, x_BTD: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """In float32: in 16 bits a slow decay rounds to no decay."""
        return self.log_decay(x_BTD), jax.nn.sigmoid(self.b_proj(x_BTD, dtype=jnp.float32))


# --- short convolutions


class ShortConvolution(nnx.Module):
    """A causal depthwise convolution over the last tokens of a document, one filter [taps] a channel."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int, int], heads_axis: str, bias: bool = False):
        self.taps = weight(rngs, shape, (None, heads_axis, "head_dim"), _identity_taps)
        self.bias = weight(rngs, shape[1:], (heads_axis, "head_dim"), zeros) if bias else None

    def __call__(self, x_BTHK: jax.Array, context: TokenContext, last: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """y [B,T,H,K], and the last inputs [B,taps-1,H*K] that the next call needs."""
        B, T, H, K = x_BTHK.shape
        y, last = convolve(x_BTHK.reshape(B, T, H * K), self.taps[...].reshape(-1, H * K), context, last)
        y = y.reshape(B, T, H, K)
        return y if self.bias is None else y + self.bias[...], last


def convolve(
    x_BTC: jax.Array, taps_WC: jax.Array, context: TokenContext, last: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The kernel: y [B,T,C], and the last inputs [B,W-1,C]."""
    kernel = short_convolution
    if context.first_token is not None:
        kernel = partial(context_short_convolution, axis_name="context")
    return kernel(x_BTC, taps_WC, context.segment_ids, last)


def qkv_convolutions(
    config: ModelConfig, rngs: nnx.Rngs, taps: int, bias: bool = False
) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
    q, k, v = (
        ShortConvolution(rngs, (taps, heads, config.head_dim), axis, bias)
        for heads, axis in ((config.num_heads, "heads"), *[(config.num_states, "kv_heads")] * 2)
    )
    return q, k, v


def convolution_state(config: ModelConfig, batch: int, taps: int, dtype: Any) -> Params:
    """The last inputs of q, k and v's convolutions before the first token; empty without convolutions."""
    heads = {"q_conv": config.num_heads, "k_conv": config.num_states, "v_conv": config.num_states} if taps else {}
    return {
        name: jnp.zeros((batch, taps - 1, own_heads(count) * config.head_dim), dtype) for name, count in heads.items()
    }


def convolution_in_words(taps: int) -> str:
    return f"convolution of {taps} taps" if taps else "no convolution"


def check_taps(name: str, taps: int) -> None:
    if taps < 0 or taps == 1:
        raise ConfigError(f"mixer.{name}={taps}: use 0 for no convolution, or at least 2 taps.")


def _identity_taps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The convolution passes its current token through: only the last tap is one."""
    return jnp.zeros(shape, jnp.float32).at[-1].set(1.0)
