"""What linear mixers made from softmax attention share: projections, options, the recurrence, the output gate."""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxhybrid_kernels import context_linear_attention, linear_attention

from jaxhybrid.model.attention import project
from jaxhybrid.model.blueprint import Params, normal, zeros
from jaxhybrid.model.config import MixerConfig, ModelConfig
from jaxhybrid.model.layers import Linear, RMSNorm, TokenContext, query_key_norms
from jaxhybrid.model.partition import own_heads, repeated


class LinearMixer(nnx.Module):
    """q, k, v and o projections as attention has them, and o = o_proj(norm(recurrence) * silu(g_proj x)).

    A subclass has a `Config` of its own, whose `kind` is its name, and a `title`.

    A mixer adds what its recurrence needs in `__init__` and computes in `__call__`, as attention does:
    (x [B,T,D], context, state of one layer or None) -> (y [B,T,D], the state after the last token or None).
    """

    Config: ClassVar[type[MixerConfig]]  # its settings
    title: ClassVar[str]  # of the architecture, for the model card
    state_heads: ClassVar[dict[str, int]] = {"memory": 1}  # the axis of heads (or their channels) in one layer's state

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        mixer = config.mixer
        assert mixer is not None
        D, H, K, N = config.hidden_size, config.num_heads, config.head_dim, config.num_states
        per_head, per_state = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(rngs, (D, heads, K), axes, bias=mixer.qkv_bias)
            for heads, axes in ((H, per_head), (N, per_state), (N, per_state))
        )
        self.o_proj = Linear(rngs, (H, K, D), ("heads", "head_dim", "embed"), bias=config.o_bias, inputs=2)
        self.o_norm = RMSNorm(rngs, K, "head_dim", config.norm_eps)
        if mixer.output_gate:
            # "value" is a copy of v_proj: see `from_attention`.
            self.g_proj = Linear(rngs, (D, H, K), per_head, init=zeros if mixer.gate_init == "zero" else normal)
        if mixer.qk_norm:
            self.q_norm, self.k_norm = query_key_norms(config, rngs, N)
        self.rope = mixer.rope

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
        assert mixer is not None
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

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        """A linear layer in a few words each, for the model card."""
        mixer = config.mixer
        assert mixer is not None
        states = f"{config.num_states} states of {config.head_dim} x {config.head_dim}"
        return [states, *["output gate"] * mixer.output_gate, *["rotary embedding"] * mixer.rope]

    def projected(self, x_BTD: jax.Array, context: TokenContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        return project(self, x_BTD, context, self.rope)

    def gated_output(self, out_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        out = self.o_norm(out_BTHK)
        if hasattr(self, "g_proj"):
            out = out * jax.nn.silu(self.g_proj(x_BTD))
        return self.o_proj(out)


def recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array | None,
    context: TokenContext,
    memory: jax.Array | None,
    norm_eps: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel: (out [B,T,H,K], memory [B,N,K,K] after the last token).

    Args:
        log_decay: at most 0, in float32: [B,T,N], [B,T,N,K], or [N] where it does not depend on the token.
        beta: [B,T,N] in (0, 1) for the delta rule; None for the additive one.
        norm_eps: q and k are first divided by their length, this inside the root; None leaves them.
    """
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
    kernel = partial(linear_attention, norm_eps=norm_eps)
    if context.first_token is not None:
        kernel = partial(context_linear_attention, norm_eps=norm_eps, axis_name="context")
    return kernel(q, k, v, log_decay, beta, context.segment_ids, memory)


# --- initial decays


def slow_half_lives(states: int) -> jax.Array:
    """Half-lives spread over the states from 64 to 4096 tokens: nearest to a softmax layer with long reach."""
    return jnp.exp(jnp.linspace(jnp.log(64.0), jnp.log(4096.0), states))


def inverse_softplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))
