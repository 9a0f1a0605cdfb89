"""What linear mixers made from softmax attention share: projections, options, the recurrence, the output gate."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import Places, Steps, context_linear_attention, linear_attention, linear_attention_token

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.attention import project
from jaxhybrid.model.blueprint import Params, normal, zeros
from jaxhybrid.model.config import LinearConfig, MixerConfig, ModelConfig, option
from jaxhybrid.model.layers import Linear, RMSNorm, TokenContext, query_key_norms
from jaxhybrid.model.partition import own_heads, repeated


class LinearMixer(nnx.Module):
    """q, k, v and o projections as attention has them, and o = o_proj(norm(recurrence) * silu(g_proj x)).

    A subclass has a `Config` of its own, whose `kind` is its name, and a `title`.

    A mixer adds what its recurrence needs in `__init__` and computes in `__call__`, as attention does:
    (x [B,T,D], context, state of one layer or None) -> (y [B,T,D], the state after the last token or None).
    """

    Config: ClassVar[type[LinearConfig]]  # its settings
    title: ClassVar[str]  # of the architecture, for the model card
    # The axis of heads (or their channels) in one layer's state; None has no such axis.
    state_heads: ClassVar[dict[str, int | None]] = {"memory": 1}
    # Whether decoding may join its weights: all its projections but the last read the layer's normed input, one has the
    # shape of heads only if it is q, k, v or the gate, and `token` serves it.
    joins: ClassVar[bool] = False
    silu: ClassVar[bool] = False  # of q, k and v
    norm_eps: ClassVar[float | None] = None  # as in `recurrence`
    # What a calibrated start (`stages.calibrate`) may set, beside the scale of each head: "decay" has
    # `with_half_lives`, "strength" `with_strengths`, "gate" `with_open_gate`.
    calibrates: ClassVar[tuple[str, ...]] = ("gate",)

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        mixer = config.mixer
        assert isinstance(mixer, LinearConfig)
        D, H, K, N = config.hidden_size, config.num_heads, config.head_dim, config.num_states
        per_head, per_state = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(rngs, (D, heads, K), axes, bias=mixer.qkv_bias)
            for heads, axes in ((H, per_head), (N, per_state), (N, per_state))
        )
        self.o_proj = Linear(rngs, (H, K, D), ("heads", "head_dim", "embed"), bias=config.o_bias, inputs=2)
        self.add_output(config, rngs)
        if mixer.qk_norm:
            self.q_norm, self.k_norm = query_key_norms(config, rngs, N)
        self.rope = mixer.rope

    def add_output(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """What `gated_output` needs: a norm of each head's output, and a gate."""
        self.o_norm = RMSNorm(rngs, config.head_dim, "head_dim", config.norm_eps)
        self.add_gate(config, rngs)

    def add_gate(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Of full rank, if the mixer has one."""
        mixer, D, H, K = config.mixer, config.hidden_size, config.num_heads, config.head_dim
        assert isinstance(mixer, LinearConfig)
        if mixer.output_gate:
            # "value" is a copy of v_proj: see `from_attention`.
            gate = zeros if mixer.gate_init == "zero" else normal
            self.g_proj = Linear(rngs, (D, H, K), ("embed", "heads", "head_dim"), init=gate)

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """The memory of one layer before the first token, of this device's heads; it does not depend on `capacity`."""
        K = config.head_dim
        return {"memory": jnp.zeros((batch, own_heads(config.num_states), K, K), jnp.float32)}

    @staticmethod
    def from_attention(attention: Params, config: ModelConfig) -> Params:
        """What the mixer takes from a teacher's softmax attention, of one layer or of a stack: its projections.

        Grouped K/V heads are cloned whole, head by head, for the query heads that read them (or kept as they are with
        `expand_kv=False`). The rest of the mixer starts from `__init__`'s values.
        """
        mixer = config.mixer
        assert isinstance(mixer, LinearConfig)
        leaves = ("kernel", "bias") if mixer.qkv_bias else ("kernel",)

        def cloned(name: str, clones: int, leaves: tuple[str, ...] = leaves) -> Params:
            """Head i of the result is head i // clones; heads are the last axis but one of kernel and bias."""
            return {leaf: repeated(attention[name][leaf], clones, axis=-2) for leaf in leaves}

        clones = config.num_states // config.num_kv_heads
        taken = {"q_proj": cloned("q_proj", 1), "k_proj": cloned("k_proj", clones), "v_proj": cloned("v_proj", clones)}
        taken["o_proj"] = attention["o_proj"]
        if mixer.qk_norm:
            wide = config.wide_qk_norm  # with a scale for each head
            taken |= {"q_norm": attention["q_norm"], "k_norm": attention["k_norm"]}
            taken |= {"k_norm": cloned("k_norm", clones, ("scale",))} if wide else {}
        if mixer.output_gate and mixer.gate_init == "value":
            taken["g_proj"] = cloned("v_proj", config.num_heads // config.num_kv_heads, ("kernel",))
        return taken

    @staticmethod
    def by_depth(depths: jax.Array, config: ModelConfig) -> Params:
        """Initial values that depend on where the layers are: depths [n], 0 for a model's first layer, 1 for its last.

        Parameters of the mixer itself, by name, stacked; they take the place of `__init__`'s.
        """
        return {}

    @classmethod
    def takes(cls, mixer: MixerConfig) -> tuple[str, ...]:
        """The parts of a calibrated start that it takes with these settings."""
        assert isinstance(mixer, LinearConfig)
        return (*(part for part in cls.calibrates if part != "gate" or mixer.output_gate), "scale")

    # Values set by calibration: of one layer's parameters, whole or a device's own, and states n alike. `constant_D` is
    # a column for a kernel on the layer's normed input that makes it give 1 on average: a bias where there is none.

    @staticmethod
    def with_half_lives(own: Params, lives_N: jax.Array) -> Params:
        """Every state forgets half in so many tokens, whatever the token."""
        raise NotImplementedError

    @staticmethod
    def with_strengths(own: Params, strengths_N: jax.Array, constant_D: jax.Array) -> Params:
        """Every state writes tokens with this strength, in (0, 1), whatever the token."""
        raise NotImplementedError

    @staticmethod
    def with_open_gate(own: Params, constant_D: jax.Array, config: ModelConfig) -> Params:
        """The output gate is the same for all channels and tokens: 1, or one half for a sigmoid."""
        return own | {"g_proj": {"kernel": constant_column(own["g_proj"]["kernel"], OPEN_SILU * constant_D)}}

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        """A linear layer in a few words each, for the model card."""
        mixer = config.mixer
        assert isinstance(mixer, LinearConfig)
        states = f"{config.num_states} states of {config.head_dim} x {config.head_dim}"
        return [states, *["output gate"] * mixer.output_gate, *["rotary embedding"] * mixer.rope]

    def gates(self, x_BTD: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """log_decay and beta as `recurrence` takes them, in float32."""
        raise NotImplementedError

    def token(
        self,
        projections_BO: jax.Array,
        firsts: dict[str, int],
        x_BTD: jax.Array,
        context: TokenContext,
        state: Params,
        then: Sequence[jax.Array],
    ) -> tuple[jax.Array, Params]:
        """`__call__` of one token up to o_proj [B,1,H*K], by the operator that does it all at once: see `takes_token`.

        The results of each projection begin at its column of `firsts`. `then` are the weights that are read next.
        """
        names = [name for name in ("q_proj", "k_proj", "v_proj", "g_proj") if name in firsts]
        places = Places(*(firsts[name] // state["memory"].shape[-1] for name in names))
        out, memory = linear_attention_token(
            projections_BO, places, self.token_gates(firsts, x_BTD), state["memory"], dtype=x_BTD.dtype, silu=self.silu,
            norm_eps=self.norm_eps, out_norm=(self.o_norm.scale[...], self.o_norm.eps), then=then,
        )  # fmt: skip
        return out[:, None], {"memory": memory}

    def token_gates(self, firsts: dict[str, int], x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None] | Steps:
        """`gates` of one token, or how they come from the projections' results."""
        log_decay, beta = self.gates(x_BTD)
        assert log_decay is not None
        return log_decay[:, 0], None if beta is None else beta[:, 0]

    def takes_token(self, projections_BO: jax.Array, context: TokenContext, state: Params) -> bool:
        """Whether `token` serves: states with a query each, and heads that come from their projections as they are."""
        heads, states = self.q_proj.kernel.shape[1], self.k_proj.kernel.shape[1]
        return heads == states and not self.rope and not hasattr(self, "q_norm") and state.keys() == {"memory"}

    def projected(self, x_BTD: jax.Array, context: TokenContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        return project(self, x_BTD, context, self.rope)

    def gate(self, x: jax.Array) -> jax.Array:
        """What the gate's projection goes through."""
        return jax.nn.silu(x)

    def gated_output(self, out_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        out = self.o_norm(out_BTHK)
        if hasattr(self, "g_proj"):
            out = out * self.gate(self.g_proj(x_BTD))
        return self.o_proj(out)


def recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    beta: jax.Array | None,
    context: TokenContext,
    memory: jax.Array | None,
    norm_eps: float | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel: (out [B,T,H,K], memory [B,N,K,K] after the last token).

    Args:
        log_decay: at most 0, in float32: [B,T,N], [B,T,N,K], or [N] where it does not depend on the token; None has
            no decay.
        beta: [B,T,N] in (0, 1) for the delta rule; None for the additive one.
        norm_eps: q and k are first divided by their length, this inside the root; None leaves them.
        scale: of the queries; None is 1 / sqrt(K).
    """
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
    kernel = partial(linear_attention, norm_eps=norm_eps, scale=scale)
    if context.first_token is not None:
        kernel = partial(context_linear_attention, norm_eps=norm_eps, scale=scale, axis_name="context")
    return kernel(q, k, v, log_decay, beta, context.segment_ids, memory)


# --- calibrated values

OPEN_SILU = 1.27846454  # silu of it is 1


def constant_column(kernel: jax.Array, column_D: jax.Array) -> jax.Array:
    """A kernel [D,...] of which every column is this one."""
    return jnp.broadcast_to(column_D.reshape(-1, *[1] * (kernel.ndim - 1)), kernel.shape).astype(kernel.dtype)


def zero_kernel(own: Params, name: str) -> Params:
    """The projection `name` with a kernel of zeros."""
    return {name: own[name] | {"kernel": jnp.zeros_like(own[name]["kernel"])}}


def logit(share: jax.Array) -> jax.Array:
    return jnp.log(share) - jnp.log1p(-share)


# --- low ranks


def low_rank_option() -> Any:
    return option(None, "rank of the mixer's own projections of low rank; null: as published, by the model's sizes")


def check_low_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"mixer.low_rank={rank}: must be at least 1, or null for the published ranks.")


def published_rank(factor: float, width: int, power: float) -> int:
    """RADLADS' ranks: factor * width^power, as a multiple of 32."""
    return max(1, round(factor * width**power / 32)) * 32


# --- initial decays


def random_A_log(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log A with A uniform in (0, 16), as Mamba-2 and fla draw it."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-3, 16.0))


def random_step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bias whose softplus is log-uniform in [0.001, 0.1], as Mamba-2 and fla draw it."""
    return inverse_softplus(jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1))))


def half_life_steps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bias [N] or [N,K] whose softplus gives the half-lives of `slow_half_lives`, with A_log and projections zero."""
    return steps_of(slow_half_lives(shape))


def steps_of(lives: jax.Array) -> jax.Array:
    """Bias whose softplus gives these half-lives, with A_log and projections zero."""
    return inverse_softplus(math.log(2.0) / lives)


def slow_half_lives(shape: tuple[int, ...]) -> jax.Array:
    """[N] or [N,K]: half-lives spread over the states from 64 to 4096 tokens, one for all channels of a state:
    nearest to a softmax layer with long reach."""
    lives = jnp.exp(jnp.linspace(jnp.log(64.0), jnp.log(4096.0), shape[0]))
    return jnp.broadcast_to(lives.reshape(-1, *[1] * (len(shape) - 1)), shape)


def inverse_softplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))
