"""Softmax attention, and the norm and the rotary embedding that both kinds of layers use. torch only.

Axes: B batch, T tokens, M keys, D model width, H query heads, G key/value heads, K head width. Projections keep
[B,T,heads,K]; attention works on [B,heads,T,K].
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_jaxhybrid import JaxHybridConfig


class JaxHybridRMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, scaled by the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class JaxHybridRotaryEmbedding(nn.Module):
    """cos and sin of the rotary angles, with the length-extension rules of transformers."""

    inv_freq: torch.Tensor

    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, length: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """Of the pairs of channels, [K/2], and what cos and sin are multiplied by. Only "dynamic" reads `length`."""
        rule = self.config.rope_parameters["rope_type"]
        if rule != "default":
            return ROPE_INIT_FUNCTIONS[rule](self.config, None if length is None else length.device, seq_len=length)
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
        return self.config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = self.inv_freq
        if self.config.rope_parameters["rope_type"] == "dynamic":
            # From this call's positions alone: transformers' own update remembers the longest text it has seen.
            inv_freq, _ = self.frequencies(position_ids.max() + 1)
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + K/2) of x [B,T,heads,K] in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def eager_attention_forward(
    module: "JaxHybridAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by matrix products; query [B,H,T,K], key and value [B,G,M,K]. Returns [B,T,H,K] and the weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class JaxHybridAttention(nn.Module):
    """Causal softmax attention with grouped key/value heads."""

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = K
        self.num_key_value_groups = H // G
        self.scaling = K**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
            self.k_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        **flash_arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output and, with eager attention, its weights [B,H,T,M]."""
        x, K = hidden_states, self.head_dim
        q, k, v = (proj(x).unflatten(-1, (-1, K)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, *position_embeddings), rotate(k, *position_embeddings), v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        backend = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **flash_arguments)
        return self.o_proj(out.flatten(2)), weights
