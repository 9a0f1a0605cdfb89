"""RWKV-6 (arXiv 2404.05892) as RADLADS adapts it to a softmax teacher (arXiv 2505.03005, RAD-RWKV6).

Every input of the layer is x moved towards the token before it, by an amount that depends on both ("token shift"):
  x_s = x_t + (x_{t-1} - x_t) (mix_s + up_s tanh(down (x_t + (x_{t-1} - x_t) mix)))   for s in r, k, v, w, g
S_t = diag(a_t) S_{t-1} + k_t v_t',   o_t = S_t' q_t / sqrt(K),   y = o_proj(o sigmoid(g_proj x_g))
a_t = exp(max(-exp(a_up tanh(a_down x_w) + decay_bias), -5)),   k_t = (1 - a_t) k_proj x_k
Keys shrink where a state forgets little, so that it keeps its size. There is no bonus for the current token and no
norm of the output.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.model.blueprint import Exact, Params, ones, weight, zeros
from jaxhybrid.model.config import LinearConfig, ModelConfig
from jaxhybrid.model.layers import Linear, TokenContext
from jaxhybrid.model.mixers.delta import convolve
from jaxhybrid.model.mixers.linear import (
    LinearMixer,
    check_low_rank,
    low_rank_option,
    published_rank,
    recurrence,
    slow_half_lives,
    zero_kernel,
)
from jaxhybrid.model.rope import rotate

LEAST_LOG_DECAY = -5.0
STREAMS = ("r", "k", "v", "w", "g")


@dataclass(frozen=True)
class RWKV6Config(LinearConfig):
    """A layer as in RADLADS' RAD-RWKV6; with `rope` as in its better one."""

    kind = "rwkv6"

    low_rank: int | None = low_rank_option()

    def __post_init__(self) -> None:
        check_low_rank(self.low_rank)


class RWKV6(LinearMixer):
    Config = RWKV6Config
    title = "RWKV-6 as in RADLADS, arXiv 2404.05892, 2505.03005"
    state_heads: ClassVar[dict[str, int | None]] = LinearMixer.state_heads | {"last_x": None}
    calibrates = ("decay", "gate")

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, RWKV6Config)
        D, K, N = config.hidden_size, config.head_dim, config.num_states
        decay_rank, shift_rank = _ranks(config)
        self.shift = TokenShift(rngs, D, shift_rank)
        self.a_down_proj = Linear(rngs, (D, decay_rank), ("embed", None), init=zeros)
        self.a_up_proj = Linear(rngs, (decay_rank, N, K), (None, "kv_heads", "head_dim"), init=_small)
        slow = mixer.decay_init == "slow"
        decays = _slow_bias if slow else _spread_bias
        self.decay_bias = weight(rngs, (N, K), ("kv_heads", "head_dim"), decays, Exact)

    def add_output(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.add_gate(config, rngs)

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """The memory, and the last token's input."""
        state = LinearMixer.initial_state(config, batch, capacity, dtype)
        return state | {"last_x": jnp.zeros((batch, 1, config.hidden_size), dtype)}

    @staticmethod
    def by_depth(depths: jax.Array, config: ModelConfig) -> Params:
        """Deeper layers forget less, as in RWKV-6."""
        assert isinstance(config.mixer, LinearConfig)
        if config.mixer.decay_init == "slow":
            return {}
        shape = config.num_states, config.head_dim
        return {"decay_bias": jax.vmap(lambda depth: _spread(shape, depth))(depths)}

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        bias = jnp.broadcast_to(_half_life_bias(lives_N)[:, None], own["decay_bias"].shape)
        return own | zero_kernel(own, "a_down_proj") | {"decay_bias": bias}

    @staticmethod
    def with_open_gate(own: Params, constant_D: jax.Array, config: ModelConfig) -> Params:
        return own | zero_kernel(own, "g_proj")

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        decay_rank, shift_rank = _ranks(config)
        return [*super().describe(config), f"decays of rank {decay_rank}", f"token shift of rank {shift_rank}"]

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        before: Params = state or {}
        (x_r, x_k, x_v, x_w, x_g), last = self.shift(x_BTD, context, before.get("last_x"))
        q, k, v = self.q_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        # In float32: in 16 bits a slow decay rounds to no decay.
        low = jnp.tanh(self.a_down_proj(x_w, dtype=jnp.float32))
        logits = self.a_up_proj(low, dtype=jnp.float32) + self.decay_bias[...]
        log_decay = jnp.maximum(-jnp.exp(logits), LEAST_LOG_DECAY)
        k = (k * -jnp.expm1(log_decay)).astype(k.dtype)
        out, memory = recurrence(q, k, v, log_decay, None, context, before.get("memory"))
        if hasattr(self, "g_proj"):
            out = out * jax.nn.sigmoid(self.g_proj(x_g))
        return self.o_proj(out), None if state is None else {"memory": memory, "last_x": last}


class TokenShift(nnx.Module):
    """x moved towards the token before it in its document, once for each of `STREAMS`; at the start not at all."""

    def __init__(self, rngs: nnx.Rngs, width: int, rank: int):
        self.mix = weight(rngs, (width,), ("embed",), ones)
        self.down_proj = Linear(rngs, (width, len(STREAMS), rank), ("embed", None, None), init=zeros)
        for name in STREAMS:
            setattr(self, f"{name}_mix", weight(rngs, (width,), ("embed",), zeros))
            setattr(self, f"{name}_up_proj", Linear(rngs, (rank, width), (None, "embed"), init=_small))

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, last: jax.Array | None
    ) -> tuple[list[jax.Array], jax.Array]:
        """One x for each stream, and the last input [B,1,D] that the next call needs."""
        previous = jnp.zeros((2, x_BTD.shape[-1]), x_BTD.dtype).at[0].set(1)  # a convolution's taps
        shifted, last = convolve(x_BTD, previous, context, last)
        delta = shifted - x_BTD
        low = jnp.tanh(self.down_proj(x_BTD + delta * self.mix[...]))
        amounts = (
            getattr(self, f"{name}_mix")[...] + getattr(self, f"{name}_up_proj")(low[..., number, :])
            for number, name in enumerate(STREAMS)
        )
        return [x_BTD + delta * amount for amount in amounts], last


def _ranks(config: ModelConfig) -> tuple[int, int]:
    """Of the decays and of the token shift; the published ones as in RADLADS' code."""
    assert isinstance(config.mixer, RWKV6Config)
    D, given = config.hidden_size, config.mixer.low_rank
    return given or published_rank(1.8, D, 0.5), given or published_rank(0.6, D, 0.8)


# --- initial values


def _small(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -0.01, 0.01)


def _spread(shape: tuple[int, ...], depth: jax.Array | float) -> jax.Array:
    """[N,K]: from -6 for the first channel, which forgets least, to -1; `depth` is 0 for the first layer, 1 for the
    last."""
    place = jnp.linspace(0.0, 1.0, math.prod(shape)).reshape(shape)
    return -6.0 + 5.0 * place ** (0.7 + 1.3 * depth)


def _spread_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _spread(shape, 0.5)


def _slow_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _half_life_bias(slow_half_lives(shape))


def _half_life_bias(lives: jax.Array) -> jax.Array:
    """Of these half-lives, where a_down_proj is zero."""
    return jnp.log(math.log(2.0) / lives)
