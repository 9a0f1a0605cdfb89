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
    """x / rms(x) over the last axis in float32, scaled by the weight, or by 1 + the weight with `offset`."""

    def __init__(self, width: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class JaxHybridHeadNorm(JaxHybridRMSNorm):
    """The norm of queries or keys [B,T,heads,K] as the base model has it: of each head, or of all heads together."""

    def __init__(self, config: JaxHybridConfig, heads: int) -> None:
        wide = config.trait("wide_qk_norm", False)
        width = heads * config.head_dim if wide else config.head_dim
        super().__init__(width, config.rms_norm_eps, config.trait("norm_offset", False))
        self.wide = wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view_as(x) if self.wide else super().forward(x)


class JaxHybridRotaryEmbedding(nn.Module):
    """cos and sin of the rotary angles, with the length-extension rules of transformers."""

    inv_freq: torch.Tensor

    def __init__(self, config: JaxHybridConfig, rope_parameters: dict[str, Any] | None = None) -> None:
        """rope_parameters: those of sliding layers, where they are not the model's."""
        super().__init__()
        self.config = config
        if rope_parameters is not None:
            self.config = JaxHybridConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=rope_parameters,
            )
        inv_freq, self.attention_scaling = self.frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, length: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
        """Of the pairs of channels, [K/2] or fewer, and what cos and sin are multiplied by.

        Only "dynamic" and "longrope" read `length`.
        """
        rule = self.config.rope_parameters["rope_type"]
        if rule != "default":
            return ROPE_INIT_FUNCTIONS[rule](self.config, None if length is None else length.device, seq_len=length)
        width = int(self.config.head_dim * self.config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return self.config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = self.inv_freq
        if self.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            # From this call's positions alone: transformers' own update remembers the longest text it has seen.
            inv_freq, _ = self.frequencies(position_ids.max() + 1)
        angles = position_ids[..., None].float() * inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class JaxHybridRotaryTables(nn.Module):
    """cos and sin of every layer: sliding layers may have a rotation of their own, others none."""

    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary_emb = JaxHybridRotaryEmbedding(config)
        window = config.trait("window", None)
        if window is not None and window["rope"] is not None:
            self.sliding_rotary_emb = JaxHybridRotaryEmbedding(config, window["rope"])

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One pair for each layer, at positions [B,T]."""
        tables = own = self.rotary_emb(x, positions)
        if hasattr(self, "sliding_rotary_emb"):
            own = self.sliding_rotary_emb(x, positions)
        still = torch.ones_like(tables[0]), torch.zeros_like(tables[1])
        unrotated = set(self.config.trait("unrotated_layers", ()))
        if not self.config.softmax.get("rope", True):
            unrotated |= {i for i, kind in enumerate(self.config.layer_types) if kind == "full_attention"}
        return [
            still if layer in unrotated else tables if self.config.window_of(layer) is None else own
            for layer in range(self.config.num_hidden_layers)
        ]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + K/2) of x [B,T,heads,K] in float32; channels beyond those of cos and sin stay."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = x.float().chunk(2, dim=-1)
    turned = (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """x, or cap * tanh(x / cap)."""
    return x if cap is None else torch.tanh(x / cap) * cap


def eager_attention_forward(
    module: "JaxHybridProjections",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by matrix products; query [B,H,T,K], key and value [B,G,M,K]. Returns [B,T,H,K] and the weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = capped(query @ key.mT * scaling, softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class JaxHybridProjections(nn.Module):
    """What softmax attention of any kind is made of: projections with grouped key/value heads, norms, rotation."""

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = K
        self.num_key_value_groups = H // G
        self.scaling = config.trait("attention_scale", K**-0.5)
        self.cap = config.trait("attention_cap", None)
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = JaxHybridHeadNorm(config, H)
            self.k_norm = JaxHybridHeadNorm(config, G)

    def projected(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [B,T,heads,K], q and k normed and rotated"""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *position_embeddings), rotate(k, *position_embeddings), v


class JaxHybridAttention(JaxHybridProjections):
    """Causal softmax attention with grouped key/value heads."""

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.sliding_window = config.window_of(layer_idx)
        self.is_causal = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        attention_mask: torch.Tensor | None,
        query_scale: torch.Tensor | None = None,
        **flash_arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output and, with eager attention, its weights [B,H,T,M].

        query_scale: [B,T,1,1], float32: what queries are multiplied by.
        """
        q, k, v = self.projected(hidden_states, position_embeddings)
        if query_scale is not None:
            q = (q * query_scale).to(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        backend = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.sliding_window is not None:  # for flash attention; others have it in their mask
            flash_arguments["sliding_window"] = self.sliding_window
        if self.cap is not None:
            flash_arguments["softcap"] = self.cap
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **flash_arguments)
        return self.o_proj(out.flatten(2)), weights
