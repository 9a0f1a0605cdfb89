"""One converted layer's output, token by token as the papers write it: what the mixers are compared with.

p are the parameters of one layer as the tree holds them, x [T,D] is one document, everything in one dtype. With arrays
of NumPy it computes at once, with those of JAX it can be differentiated.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def layer_output(config, p, x):
    """[T,D] of one document; linear layers without rotary embedding."""
    return LAYERS[config.mixer.kind](config, p, x)


def library(x):
    return jnp if isinstance(x, jax.Array) else np


def sigmoid(x):
    return 1 / (1 + library(x).exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return library(x).log1p(library(x).exp(x))


def repeat(x, times, axis):
    return library(x).repeat(x, times, axis=axis)


def project(p, name, x):
    y = library(x).tensordot(x, p[name]["kernel"], 1)
    return y + p[name]["bias"] if "bias" in p[name] else y


def rms(x, scale, eps, axes=-1):
    return x / library(x).sqrt(library(x).mean(x * x, axis=axes, keepdims=True) + eps) * scale


def qkv(config, p, xs):
    q, k, v = (project(p, f"{name}_proj", x) for name, x in zip("qkv", xs))
    if config.mixer.qk_norm:
        q, k = (rms(x, p[f"{name}_norm"]["scale"], config.norm_eps) for name, x in (("q", q), ("k", k)))
    return q, k, v


def convolved(p, name, x):
    """y_t = sum_w taps_w x_{t-W+1+w} + bias"""
    taps = p[name]["taps"]
    W = taps.shape[0]
    past = library(x).concatenate([library(x).zeros((W - 1, *x.shape[1:]), x.dtype), x])
    y = sum(taps[w] * past[w : w + x.shape[0]] for w in range(W))
    return y + p[name]["bias"] if "bias" in p[name] else y


def unit(x):
    return x / library(x).sqrt(library(x).sum(x * x, axis=-1, keepdims=True) + 1e-6)


def recurrence(q, k, v, update, scale):
    """o_t = scale S_t' q_t [T,H,K], where S_t [N,K,V] = update(t, S_{t-1}); query head h reads state h // (H / N)."""
    S, outputs = np.zeros((v.shape[1], k.shape[2], v.shape[2])), []
    for t in range(v.shape[0]):
        S = update(t, S)
        outputs.append(scale * library(S).einsum("hk,hkv->hv", q[t], repeat(S, q.shape[1] // S.shape[0], 0)))
    return library(q).stack(outputs)


def outer(k, v):
    return k[:, :, None] * v[:, None, :]


def delta(k, v, beta, decay):
    """S = (I - b k k') a S + b k v'; decay [T,N,1] or [T,N,K]."""

    def update(t, S):
        S = decay[t][:, :, None] * S
        return S + beta[t][:, None, None] * outer(k[t], v[t] - library(k).einsum("nk,nkv->nv", k[t], S))

    return update


def additive(k, v, decay):
    return lambda t, S: decay[t][:, :, None] * S + outer(k[t], v[t])


def output(p, o, gate):
    return library(o).einsum("thk,hkd->td", o * gate, p["o_proj"]["kernel"]) + p["o_proj"]["bias"]


def delta_layer(config, p, x, decay, gate):
    q, k, v = qkv(config, p, (x, x, x))
    if config.mixer.conv_size:
        q, k, v = (convolved(p, f"{name}_conv", y) for name, y in zip("qkv", (q, k, v)))
    q, k, v = unit(silu(q)), unit(silu(k)), silu(v)
    beta = sigmoid(project(p, "b_proj", x))
    o = recurrence(q, k, v, delta(k, v, beta, decay), config.head_dim**-0.5)
    return output(p, rms(o, p["o_norm"]["scale"], config.norm_eps), gate)


def gated_deltanet(config, p, x):
    decay = library(x).exp(-library(x).exp(p["A_log"]) * softplus(project(p, "a_proj", x) + p["dt_bias"]))
    return delta_layer(config, p, x, decay[..., None], silu(project(p, "g_proj", x)))


def deltanet(config, p, x):
    decay = np.ones((x.shape[0], config.num_states, 1))
    return delta_layer(config, p, x, decay, silu(project(p, "g_proj", x)))


def kimi_delta(config, p, x):
    logits = project(p, "a_up_proj", project(p, "a_down_proj", x))
    decay = library(x).exp(-library(x).exp(p["A_log"])[:, None] * softplus(logits + p["dt_bias"]))
    gate = sigmoid(project(p, "g_up_proj", project(p, "g_down_proj", x)))
    return delta_layer(config, p, x, decay, gate)


def gla(config, p, x):
    q, k, v = qkv(config, p, (x, x, x))
    decay = sigmoid(project(p, "a_up_proj", project(p, "a_down_proj", x))) ** (1 / 16)
    o = recurrence(q, k, v, additive(k, v, decay), config.head_dim**-0.5)
    return output(p, rms(o, p["o_norm"]["scale"], config.norm_eps), silu(project(p, "g_proj", x)))


def fixed_decay(config, p, x):
    q, k, v = qkv(config, p, (x, x, x))
    N, gate = config.num_states, project(p, "g_proj", x)
    if config.mixer.form == "retnet":
        decay, gate = [1 - 2.0 ** (-5 - n) for n in range(N)], silu(gate)
    else:
        decay, gate = [math.exp(-(2.0 ** (-8 * (n + 1) / N))) for n in range(N)], sigmoid(gate)
        q, k, v = silu(q), silu(k), silu(v)
    decay = np.tile(np.array(decay)[:, None], (x.shape[0], 1, 1))
    o = recurrence(q, k, v, additive(k, v, decay), config.head_dim**-0.5)
    return output(p, rms(o, p["o_norm"]["scale"], config.norm_eps), gate)


def mamba2(config, p, x):
    q, k, v = (silu(convolved(p, f"{name}_conv", y)) for name, y in zip("qkv", qkv(config, p, (x, x, x))))
    steps = softplus(project(p, "dt_proj", x) + p["dt_bias"])
    decay = library(x).exp(-library(x).exp(p["A_log"]) * steps)[..., None]
    y = recurrence(q, k, v, additive(steps[..., None] * k, v, decay), 1.0)
    y = y + p["D"][:, None] * repeat(v, config.num_heads // config.num_states, 1)
    axes = (-1,) if config.mixer.head_norm else (-2, -1)
    y = rms(y * silu(project(p, "g_proj", x)), p["norm"]["scale"], config.norm_eps, axes=axes)
    return output(p, y, 1.0)


def rwkv6(config, p, x):
    s = p["shift"]
    to_previous = library(x).concatenate([library(x).zeros_like(x[:1]), x[:-1]]) - x
    low = library(x).tanh(library(x).tensordot(x + to_previous * s["mix"], s["down_proj"]["kernel"], 1))
    r, key, value, w, g = (
        x + to_previous * (s[f"{name}_mix"] + low[:, number] @ s[f"{name}_up_proj"]["kernel"])
        for number, name in enumerate("rkvwg")
    )
    q, k, v = qkv(config, p, (r, key, value))
    logits = project(p, "a_up_proj", library(x).tanh(project(p, "a_down_proj", w))) + p["decay_bias"]
    decay = library(x).exp(library(x).maximum(-library(x).exp(logits), -5.0))
    k = k * (1 - decay)
    o = recurrence(q, k, v, additive(k, v, decay), config.head_dim**-0.5)
    return output(p, o, sigmoid(project(p, "g_proj", g)))


def rwkv7(config, p, x):
    q, k, v = qkv(config, p, (x, x, x))
    logits = project(p, "a_up_proj", library(x).tanh(project(p, "a_down_proj", x))) + p["decay_bias"]
    decay = library(x).exp(-math.exp(-0.5) * sigmoid(logits))
    rate = sigmoid(project(p, "r_up_proj", project(p, "r_down_proj", x)) + p["rate_bias"])
    kappa = k * p["removal"]
    kappa = kappa / library(x).sqrt((kappa * kappa).sum(-1, keepdims=True))
    k = k * (1 - decay + rate)

    def update(t, S):
        """S' = S' (diag(a) - kappa (rate kappa)') + v k', as RWKV-7 writes it, with rows for values."""
        transition = decay[t][:, None] * np.eye(decay.shape[-1]) - outer(kappa[t], rate[t] * kappa[t])
        return (S.swapaxes(1, 2) @ transition + outer(v[t], k[t])).swapaxes(1, 2)

    o = recurrence(q, k, v, update, config.head_dim**-0.5)
    return output(p, o, project(p, "g_up_proj", sigmoid(project(p, "g_down_proj", x))))


def window_attention(config, p, x):
    q, k, v = (project(p, f"{name}_proj", x) for name in "qkv")
    q, k = (rms(y, p[f"{name}_norm"]["scale"], config.norm_eps) for name, y in (("q", q), ("k", k)))
    cos, sin = rotation(config, x)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k, v = (repeat(y, config.num_heads // config.num_kv_heads, 1) for y in (k, v))
    outputs = []
    for t in range(x.shape[0]):
        seen = np.array([s for s in range(t + 1) if s > t - config.mixer.window or s < config.mixer.sinks])
        weights = library(x).exp(library(x).einsum("hk,shk->hs", q[t], k[seen]) / math.sqrt(config.head_dim))
        weights = weights / weights.sum(-1, keepdims=True)
        outputs.append(library(x).einsum("hs,shk->hk", weights, v[seen]))
    return output(p, library(x).stack(outputs), 1.0)


def rotation(config, x):
    """cos and sin [T,1,K/2] of the angles."""
    pairs = np.arange(config.head_dim // 2)
    angles = np.arange(x.shape[0])[:, None] * config.rope.theta ** (-2.0 * pairs / config.head_dim)
    return np.cos(angles)[:, None], np.sin(angles)[:, None]


def rotated(x, cos, sin):
    """Channel i turns with channel i + K/2."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return library(x).concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


LAYERS = {
    layer.__name__: layer
    for layer in (
        gated_deltanet, gla, deltanet, kimi_delta, fixed_decay, mamba2, rwkv6, rwkv7, window_attention,
    )
}  # fmt: skip
