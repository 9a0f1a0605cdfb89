"""What linear attention layers share. torch only.

Axes: B batch, T tokens, D model width, H query heads, N states of a layer, R = H / N queries that read one state,
K head width, W convolution taps. Projections keep [B,T,heads,K]; recurrences work on [B,heads,T,K].
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .softmax_attention_jaxhybrid import JaxHybridHeadNorm, JaxHybridRMSNorm, rotate

FORGET = -1e4  # log decay at a document's first token: exp is 0, and sums of several stay finite


# Parameters that must keep their precision live in modules of our own: what quantizes a model replaces `nn.Linear` and
# `nn.Conv1d`, and what offloads one fills in a parameter when the module that holds it is called.


class JaxHybridGateProjection(nn.Module):
    """x W' + b in float32, whatever the dtypes of x and W: in 16 bits a slow decay rounds to no decay."""

    def __init__(self, width: int, gates: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(gates, width))
        self.bias = nn.Parameter(torch.empty(gates)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class JaxHybridShortConvolution(nn.Module):
    """Causal depthwise convolution over the real tokens of a document: y_t = sum_w taps[:, w] x_{t-W+1+w} + bias."""

    def __init__(self, channels: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None, real: torch.Tensor | None, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `causal_convolution`."""
        y, last = causal_convolution(x, self.weight.to(x.dtype), past, real, first)
        return y if self.bias is None else y + self.bias.to(x.dtype), last


def causal_convolution(
    x: torch.Tensor,
    taps: torch.Tensor,
    past: torch.Tensor | None,
    real: torch.Tensor | None,
    first: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B,T,channels] float32, taps [channels,1,W]; past [B,channels,W-1], the inputs before x, zeros where none are.

    real [B,T] is False on padding, which is stepped over as if absent; first [B,T] is True where a document starts.
    Returns y and the last W-1 real inputs of the last document, the `past` of the next call.
    """
    B, T, channels = x.shape
    W = taps.shape[-1]
    past = x.new_zeros(B, channels, W - 1) if past is None else past
    document = None if first is None else first.long().cumsum(1)  # 0: the document that the past belongs to
    order = None
    if real is not None:  # real tokens first, in their order
        order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
        document = None if document is None else document.gather(1, order)
    inputs = torch.cat([past, x.mT], dim=-1)
    if document is None:
        y = F.conv1d(inputs, taps, groups=channels).mT
    else:
        document = F.pad(document, (W - 1, 0))
        same = document.unfold(1, T, 1) == document[:, None, W - 1 :]  # [B,W,T]: is the input of tap w at t its own
        terms = [taps[:, 0, w, None] * inputs[..., w : w + T] * same[:, None, w] for w in range(W)]
        y = torch.stack(terms).sum(0).mT
    count = torch.full((B,), T, device=x.device) if real is None else real.sum(1)
    kept = count[:, None] + torch.arange(W - 1, device=x.device)  # [B,W-1], columns of `inputs`
    last = inputs.gather(2, kept[:, None].expand(B, channels, W - 1))
    if document is not None:
        newest = document.gather(1, (count + W - 2).clamp(min=0)[:, None])
        last = last * (document.gather(1, kept) == newest)[:, None]
    if order is not None:
        y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
    return y, last


def convolve_all(
    convolutions: tuple[JaxHybridShortConvolution, ...],
    inputs: tuple[torch.Tensor, ...],
    past: torch.Tensor | None,
    real: torch.Tensor | None,
    first: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each of the inputs [B,T,heads,K] by its convolution, and the `past` of all of them for the next call."""
    flat = [x.flatten(2) for x in inputs]
    pasts = [None] * len(flat) if past is None else past.split([x.shape[2] for x in flat], dim=1)
    convolved = [conv(x, past, real, first) for conv, x, past in zip(convolutions, flat, pasts)]
    outputs = [y.unflatten(-1, x.shape[2:]) for (y, _), x in zip(convolved, inputs)]
    return outputs, torch.cat([last for _, last in convolved], dim=1)


def marked(
    real: torch.Tensor | None, first: torch.Tensor | None, log_decay: torch.Tensor, *written: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """log_decay and what is written into a state, all [B,T,...], so that documents and padding are as they should be.

    `real` [B,T] is False on padding, which neither writes nor decays the state. `first` [B,T] is True where a document
    starts: with an empty state.
    """

    def over(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))

    if first is not None:
        log_decay = log_decay.masked_fill(over(first, log_decay), FORGET)
    if real is None:
        return log_decay, *written
    return tuple(x * over(real, x) for x in (log_decay, *written))


def published_rank(factor: float, width: int, power: float) -> int:
    """RADLADS' ranks: factor * width^power, as a multiple of 32."""
    return max(1, round(factor * width**power / 32)) * 32


class JaxHybridStateful(nn.Module):
    """A layer with a state of fixed size, and its place in a cache."""

    name: ClassVar[str]  # of its settings in the config
    float32: ClassVar[tuple[str, ...]] = ()  # parameters or modules that stay float32 when a model is loaded in 16 bits
    layer_idx: int

    def read(self, cache: Cache | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if cache is None or not cache.has_previous_state(self.layer_idx, state_idx=0):
            return None, None
        layer: Any = cache.layers[self.layer_idx]
        return layer.conv_states[0], layer.recurrent_states[0]

    def write(self, cache: Cache | None, last_inputs: torch.Tensor, state: torch.Tensor) -> None:
        if cache is not None:  # from its convolution state the cache learns that it has a past
            cache.update_conv_state(last_inputs, self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)

    def init_own_weights(self) -> None:
        """Fresh values of the parameters that stand in this very module."""


class JaxHybridLinearAttention(JaxHybridStateful):
    """What linear layers share: projections, norms and the output gate."""

    settings: ClassVar[tuple[str, ...]] = ("expand_kv", "output_gate", "rope", "qkv_bias", "qk_norm")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        settings = config.linear_settings(self.name, self.settings)
        D, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
        N = H if settings["expand_kv"] else config.num_key_value_heads
        self.layer_idx = layer_idx
        self.head_dim, self.num_states, self.rope = K, N, settings["rope"]
        self.q_proj = nn.Linear(D, H * K, bias=settings["qkv_bias"])
        self.k_proj = nn.Linear(D, N * K, bias=settings["qkv_bias"])
        self.v_proj = nn.Linear(D, N * K, bias=settings["qkv_bias"])
        self.add_output(config, settings)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.qk_norm = settings["qk_norm"]
        if self.qk_norm:
            self.q_norm = JaxHybridHeadNorm(config, H)
            self.k_norm = JaxHybridHeadNorm(config, N)

    def add_output(self, config: JaxHybridConfig, settings: dict[str, Any]) -> None:
        """What `normed` and `gated_output` need."""
        heads = config.num_attention_heads
        self.o_norm = JaxHybridRMSNorm(self.head_dim, config.rms_norm_eps)
        self.g_proj = (
            nn.Linear(config.hidden_size, heads * self.head_dim, bias=False) if settings["output_gate"] else None
        )

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """What the gate's projection goes through."""
        return F.silu(x)

    def projected(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [B,T,heads,K] of x, or of an x for each"""
        inputs = (x, x, x) if isinstance(x, torch.Tensor) else x
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj, x in zip(projections, inputs))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        return q, k, v

    def queries_by_state(self, q: torch.Tensor) -> torch.Tensor:
        """[B,T,H,K] -> [B,N,R,T,K], scaled."""
        return q.unflatten(2, (self.num_states, -1)).permute(0, 2, 3, 1, 4) * self.head_dim**-0.5

    def by_head(self, out: torch.Tensor) -> torch.Tensor:
        """[B,N,R,T,K] -> [B,T,H,K]"""
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def empty_state(self, q: torch.Tensor) -> torch.Tensor:
        return q.new_zeros(q.shape[0], self.num_states, self.head_dim, self.head_dim)

    def recurred(
        self,
        rule: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        cache: Cache | None,
        last_inputs: torch.Tensor,
        state: torch.Tensor | None,
        q: torch.Tensor,
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        """q and the inputs [B,T,...] of `rule` through it, from a state or an empty one: [B,N,R,T,K]. The cache gets
        the state after them, and the last inputs."""
        state = self.empty_state(q) if state is None else state
        out, state = rule(self.queries_by_state(q), *(x.transpose(1, 2) for x in inputs), state)
        self.write(cache, last_inputs, state)
        return out

    def nothing_kept(self, q: torch.Tensor) -> torch.Tensor:
        """The last inputs of a layer that needs none: see `write`."""
        return q.new_zeros(q.shape[0], 1, 1)

    def normed(self, out: torch.Tensor) -> torch.Tensor:
        """[B,N,R,T,K] -> [B,T,H,K]"""
        return self.o_norm(self.by_head(out))

    def gated_output(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out [B,T,H,K] float32 -> y [B,T,D]"""
        if self.g_proj is not None:
            out = out * self.gate(self.g_proj(x).unflatten(-1, (-1, self.head_dim)).float())
        return self.o_proj(out.flatten(2).to(x.dtype))


class JaxHybridConvolved(JaxHybridLinearAttention):
    """A layer with a short convolution on q, k and v, where its size is not 0."""

    q_conv: JaxHybridShortConvolution
    k_conv: JaxHybridShortConvolution
    v_conv: JaxHybridShortConvolution

    def add_convolutions(self, config: JaxHybridConfig, size: int, bias: bool = False) -> None:
        H, K, N = config.num_attention_heads, self.head_dim, self.num_states
        self.conv_size = size
        if size:
            for name, channels in (("q_conv", H * K), ("k_conv", N * K), ("v_conv", N * K)):
                setattr(self, name, JaxHybridShortConvolution(channels, size, bias=bias))

    def convolved(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        past: torch.Tensor | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v in float32, and the convolutions' `past` for the next call."""
        q, k, v = (x.float() for x in inputs)
        last_inputs = self.nothing_kept(q)
        if self.conv_size:
            convolutions = (self.q_conv, self.k_conv, self.v_conv)
            (q, k, v), last_inputs = convolve_all(convolutions, (q, k, v), past, real, first)
        return q, k, v, last_inputs
