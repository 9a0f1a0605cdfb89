"""RWKV-7 (arXiv 2503.14456) as RADLADS adapts it to a softmax teacher (arXiv 2505.03005, RAD-RWKV7).

S_t = diag(a_t) S_{t-1} - (r_t u_t) (u_t' S_{t-1}) + k_t v_t',   o_t = S_t' q_t / sqrt(K)
u_t = removal of the key: k_proj x * removal, divided by its length for each head
a_t = exp(-e^-0.5 sigmoid(a_up tanh(a_down x) + decay_bias)),   r_t = sigmoid(r_up r_down x + rate_bias)
k_t = (1 - a_t + r_t) k_proj x,   y = o_proj(o * g_up sigmoid(g_down x))

The transition is a diagonal plus rank one with two different vectors (`dplr_attention` of the kernels). Without token
shift, without a bonus for the current token and without a norm of the output, as there. Not taken over from there is
the value residual, which ties every layer's values to those of the first: here a layer is aligned by itself. See
docs/mixers.md.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import context_dplr_attention, dplr_attention

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Exact, Params, weight, zeros
from jaxhybrid.model.config import LinearConfig, ModelConfig
from jaxhybrid.model.layers import Linear, TokenContext
from jaxhybrid.model.mixers.linear import (
    LinearMixer,
    check_low_rank,
    logit,
    low_rank_option,
    published_rank,
    slow_half_lives,
    zero_kernel,
)

FASTEST = math.exp(-0.5)  # of -log decay: a state never forgets more than 45 % of a channel in a token
SHORTEST = 1.5  # half-life that calibration may set; FASTEST is 1.14
LENGTH_EPS = 1e-12  # inside the root of a removal's length, so that the gradient at a zero key is finite


@dataclass(frozen=True)
class RWKV7Config(LinearConfig):
    """A layer as in RADLADS' RAD-RWKV7, which rotates queries and keys: `rope`."""

    kind = "rwkv7"

    low_rank: int | None = low_rank_option()

    def __post_init__(self) -> None:
        check_low_rank(self.low_rank)
        if not self.expand_kv:
            raise ConfigError("mixer.expand_kv=False: rwkv7 has one query a state; leave it true.")
        if self.gate_init == "value":
            raise ConfigError("mixer.gate_init='value': the gate of rwkv7 is of low rank and cannot be v_proj.")


class RWKV7(LinearMixer):
    Config = RWKV7Config
    title = "RWKV-7 as in RADLADS, arXiv 2503.14456, 2505.03005"
    calibrates = ("decay", "strength", "gate")

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        mixer = config.mixer
        assert isinstance(mixer, RWKV7Config)
        D, N, K, (R, _) = config.hidden_size, config.num_states, config.head_dim, _ranks(config)
        per_state = ("kv_heads", "head_dim")
        self.a_down_proj = Linear(rngs, (D, R), ("embed", None), init=zeros)
        self.a_up_proj = Linear(rngs, (R, N, K), (None, *per_state), init=_orthogonal)
        decays = _slow_bias if mixer.decay_init == "slow" else _spread_bias
        self.decay_bias = weight(rngs, (N, K), per_state, decays, Exact)
        self.r_down_proj = Linear(rngs, (D, R), ("embed", None), init=zeros)
        self.r_up_proj = Linear(rngs, (R, N, K), (None, *per_state), init=_orthogonal)
        self.rate_bias = weight(rngs, (N, K), per_state, zeros, Exact)
        self.removal = weight(rngs, (N, K), per_state, _constant_removal, Exact)

    def add_output(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        mixer, D, H, K, (_, R) = config.mixer, config.hidden_size, config.num_heads, config.head_dim, _ranks(config)
        assert isinstance(mixer, LinearConfig)
        if mixer.output_gate:
            up = zeros if mixer.gate_init == "zero" else _orthogonal
            self.g_down_proj = Linear(rngs, (D, R), ("embed", None), init=zeros)
            self.g_up_proj = Linear(rngs, (R, H, K), (None, "heads", "head_dim"), init=up)

    @staticmethod
    def by_depth(depths: jax.Array, config: ModelConfig) -> Params:
        """Deeper layers forget less, as in RWKV-7."""
        assert isinstance(config.mixer, LinearConfig)
        if config.mixer.decay_init == "slow":
            return {}
        shape = config.num_states, config.head_dim
        return {"decay_bias": jax.vmap(lambda depth: _spread(shape, depth))(depths)}

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        """At least `SHORTEST` tokens: the decays end there."""
        bias = _half_life_bias(jnp.maximum(lives_N, SHORTEST))[:, None]
        return own | zero_kernel(own, "a_down_proj") | {"decay_bias": jnp.broadcast_to(bias, own["decay_bias"].shape)}

    @staticmethod
    def with_strengths(own: Params, strengths_N: jax.Array, constant_D: jax.Array) -> Params:
        bias = jnp.broadcast_to(logit(strengths_N)[:, None], own["rate_bias"].shape)
        return own | zero_kernel(own, "r_down_proj") | {"rate_bias": bias}

    @staticmethod
    def with_open_gate(own: Params, constant_D: jax.Array, config: ModelConfig) -> Params:
        up = own["g_up_proj"]["kernel"]  # of sigmoids that are one half
        return own | zero_kernel(own, "g_down_proj") | {"g_up_proj": {"kernel": jnp.full_like(up, 2.0 / len(up))}}

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        rank, gate_rank = _ranks(config)
        return [*super().describe(config), f"decays and rates of rank {rank}", f"gate of rank {gate_rank}"]

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        q, k, v = self.projected(x_BTD, context)
        # Gates in float32: in 16 bits a slow decay rounds to no decay.
        down, up = partial(self.a_down_proj, dtype=jnp.float32), partial(self.a_up_proj, dtype=jnp.float32)
        log_decay = -FASTEST * jax.nn.sigmoid(up(jnp.tanh(down(x_BTD))) + self.decay_bias[...])
        low = self.r_down_proj(x_BTD, dtype=jnp.float32)
        rate = jax.nn.sigmoid(self.r_up_proj(low, dtype=jnp.float32) + self.rate_bias[...])
        removed = k * self.removal[...]  # in float32
        removed = removed * jax.lax.rsqrt(jnp.sum(removed * removed, axis=-1, keepdims=True) + LENGTH_EPS)
        k = (k * (rate - jnp.expm1(log_decay))).astype(k.dtype)
        kernel = dplr_attention
        if context.first_token is not None:
            kernel = partial(context_dplr_attention, axis_name="context")
        a, b = (-removed).astype(k.dtype), (removed * rate).astype(k.dtype)
        memory = None if state is None else state["memory"]
        out, memory = kernel(q, k, v, log_decay, a, b, context.segment_ids, memory)
        if hasattr(self, "g_up_proj"):
            out = out * self.g_up_proj(jax.nn.sigmoid(self.g_down_proj(x_BTD)))
        return self.o_proj(out), None if state is None else {"memory": memory}


def _ranks(config: ModelConfig) -> tuple[int, int]:
    """Of decays and rates, and of the gate; the published ones as in RADLADS' code."""
    assert isinstance(config.mixer, RWKV7Config)
    D, given = config.hidden_size, config.mixer.low_rank
    return given or published_rank(1.8, D, 0.5), given or published_rank(0.6, D, 0.8)


# --- initial values


def _orthogonal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[R,N,K]: the R rows orthogonal and of length 0.1 (the columns, lengthened, where there are more rows)."""
    rows, columns = shape[0], math.prod(shape[1:])
    scale = 0.1 * math.sqrt(max(rows / columns, 1.0))
    return scale * jax.nn.initializers.orthogonal()(key, (rows, columns), jnp.float32).reshape(shape)


def _constant_removal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.full(shape, 0.85, jnp.float32)


def _spread(shape: tuple[int, ...], depth: jax.Array | float) -> jax.Array:
    """[N,K]: from -6.5 for the first channel, which forgets least, to -1.5; `depth` is 0 for the first layer, 1 for
    the last."""
    place = jnp.linspace(0.0, 1.0, math.prod(shape)).reshape(shape)
    return -6.5 + 5.0 * place ** (0.85 + jnp.sqrt(depth))


def _spread_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _spread(shape, 0.5)


def _slow_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _half_life_bias(slow_half_lives(shape))


def _half_life_bias(lives: jax.Array) -> jax.Array:
    """Of these half-lives, where a_down_proj is zero."""
    return logit(math.log(2.0) / lives / FASTEST)
