"""Gated DeltaNet (arXiv 2412.06464) as in Qwen3.5's linear layer, with a teacher's biases and norms where it has them.

S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t',   o_t = S_t' q_t / sqrt(K)
a_t = exp(-exp(A_log) softplus(a_proj x + dt_bias)),   b_t = sigmoid(b_proj x)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxhybrid_kernels import linear_attention, short_convolution

from jaxhybrid.model.config import GatedDeltaNetConfig, ModelConfig
from jaxhybrid.model.layers import TokenContext, rms_norm
from jaxhybrid.model.params import Params, ParamSpec, normal, ones, zeros
from jaxhybrid.model.partition import per_example
from jaxhybrid.model.rope import rotate

L2_EPS = 1e-6  # inside the square root, so that the gradient at a zero row is finite


def settings(config: ModelConfig) -> GatedDeltaNetConfig:
    """The mixer's settings with "as the teacher has it" filled in."""
    mixer = config.gated_deltanet
    assert mixer is not None
    return mixer


def num_states(config: ModelConfig) -> int:
    """States (and key and value heads) of one layer: one per query head, or one per teacher K/V head."""
    return config.num_heads if settings(config).expand_kv else config.num_kv_heads


def declare(config: ModelConfig) -> Params:
    mixer = settings(config)
    D, H, K, N = config.hidden_size, config.num_heads, config.head_dim, num_states(config)
    per_head = ("embed", "heads", "head_dim")
    specs = {
        "q_proj": ParamSpec((D, H, K), per_head, normal()),
        "k_proj": ParamSpec((D, N, K), per_head, normal()),
        "v_proj": ParamSpec((D, N, K), per_head, normal()),
        "o_proj": ParamSpec((H, K, D), ("heads", "head_dim", "embed"), normal()),
        "a_proj": ParamSpec((D, N), ("embed", "heads"), zeros if mixer.decay_init == "slow" else normal()),
        "b_proj": ParamSpec((D, N), ("embed", "heads"), normal()),
        "A_log": ParamSpec((N,), ("heads",), zeros if mixer.decay_init == "slow" else _random_log_decay, float32=True),
        "dt_bias": ParamSpec(
            (N,), ("heads",), _half_life_bias if mixer.decay_init == "slow" else _random_step_bias, float32=True
        ),
        "o_norm": ParamSpec((K,), ("head_dim",), ones),
    }
    if mixer.output_gate:
        specs["g_proj"] = ParamSpec((D, H, K), per_head, zeros if mixer.gate_init == "zero" else normal())
    if mixer.conv_size:
        for name, heads in (("q_conv", H), ("k_conv", N), ("v_conv", N)):
            specs[name] = ParamSpec((mixer.conv_size, heads, K), (None, "heads", "head_dim"), _identity_taps)
    if mixer.qkv_bias:
        for name, heads in (("q_bias", H), ("k_bias", N), ("v_bias", N)):
            specs[name] = ParamSpec((heads, K), ("heads", "head_dim"), zeros)
    if config.o_bias:
        specs["o_bias"] = ParamSpec((D,), ("embed",), zeros)
    if mixer.qk_norm:
        specs |= {"q_norm": ParamSpec((K,), ("head_dim",), ones), "k_norm": ParamSpec((K,), ("head_dim",), ones)}
    return specs


def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The constant-size memory of one layer (`capacity` does not matter) and the convolution's last inputs."""
    mixer, K, N = settings(config), config.head_dim, num_states(config)
    state = {"memory": jnp.zeros((batch, N, K, K), jnp.float32)}
    if mixer.conv_size:
        for name, heads in (("q_conv", config.num_heads), ("k_conv", N), ("v_conv", N)):
            state[name] = jnp.zeros((batch, mixer.conv_size - 1, heads * K), dtype)
    return state


def apply(
    params: Params, config: ModelConfig, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
) -> tuple[jax.Array, Params | None]:
    """Mixer output after o_proj [B,T,D], and the state after the last token when one was given."""
    mixer = settings(config)
    q = jnp.einsum("btd,dhk->bthk", x_BTD, params["q_proj"])
    k = jnp.einsum("btd,dnk->btnk", x_BTD, params["k_proj"])
    v = jnp.einsum("btd,dnk->btnk", x_BTD, params["v_proj"])
    if mixer.qkv_bias:
        q, k, v = q + params["q_bias"], k + params["k_bias"], v + params["v_bias"]
    if mixer.qk_norm:
        q = rms_norm(q, params["q_norm"], config.norm_eps)
        k = rms_norm(k, params["k_norm"], config.norm_eps)
    if mixer.rope:
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
    new_state: Params = {}
    if mixer.conv_size:
        before: Params = state or {}
        q, new_state["q_conv"] = _convolve(q, params["q_conv"], context, before.get("q_conv"))
        k, new_state["k_conv"] = _convolve(k, params["k_conv"], context, before.get("k_conv"))
        v, new_state["v_conv"] = _convolve(v, params["v_conv"], context, before.get("v_conv"))
    q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)

    # Gates in float32: in 16 bits a slow decay rounds to no decay.
    a = jnp.einsum("btd,dn->btn", x_BTD, params["a_proj"], preferred_element_type=jnp.float32)
    b = jnp.einsum("btd,dn->btn", x_BTD, params["b_proj"], preferred_element_type=jnp.float32)
    log_decay = -jnp.exp(params["A_log"]) * jax.nn.softplus(a + params["dt_bias"])
    beta = jax.nn.sigmoid(b)
    memory = None if state is None else state["memory"]
    out, new_state["memory"] = _recurrence(q, k, v, log_decay, beta, context.segment_ids, memory)

    out = rms_norm(out, params["o_norm"], config.norm_eps)
    if mixer.output_gate:
        out = out * jax.nn.silu(jnp.einsum("btd,dhk->bthk", x_BTD, params["g_proj"]))
    y = jnp.einsum("bthk,hkd->btd", out, params["o_proj"])
    return (y + params["o_bias"] if config.o_bias else y), None if state is None else new_state


def _recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: jax.Array | None,
    memory: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel on each device's own examples, q and k normalized; absent arguments stay absent."""
    optional = {"segment_ids": segment_ids, "initial_state": memory}
    names = [name for name, value in optional.items() if value is not None]

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, *rest: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        given: dict[str, Any] = dict(zip(names, rest))
        return linear_attention(q, k, v, log_decay=log_decay, beta=beta, norm_eps=L2_EPS, **given)

    return per_example(run, q, k, v, log_decay, beta, *(optional[name] for name in names))


def _convolve(
    x_BTHK: jax.Array, taps_WHK: jax.Array, context: TokenContext, state: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    _, T, H, K = x_BTHK.shape
    optional = {"segment_ids": context.segment_ids, "initial_state": state}
    names = [name for name, value in optional.items() if value is not None]

    def run(x: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        given: dict[str, Any] = dict(zip(names, rest[:-1]))
        y, last = short_convolution(x.reshape(-1, T, H * K), rest[-1], **given)
        return y.reshape(-1, T, H, K), last

    taps = taps_WHK.reshape(taps_WHK.shape[0], H * K)
    return per_example(run, x_BTHK, *(optional[name] for name in names), whole=(taps,))


# --- initial values that are not plain zeros, ones or normals


def inverse_softplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))


def _random_log_decay(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log A with A uniform in (0, 16), as Mamba-2 and fla draw it."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1e-3, 16.0))


def _random_step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bias whose softplus is log-uniform in [0.001, 0.1], as Mamba-2 and fla draw it."""
    return inverse_softplus(jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1))))


def _half_life_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Half-lives spread over the heads from 64 to 4096 tokens: nearest to a softmax layer with long reach."""
    half_lives = jnp.exp(jnp.linspace(math.log(64.0), math.log(4096.0), shape[-1]))
    return jnp.broadcast_to(inverse_softplus(math.log(2.0) / half_lives), shape)


def _identity_taps(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The convolution passes its current token through: only the last tap is one."""
    return jnp.zeros(shape, jnp.float32).at[-1].set(1.0)
