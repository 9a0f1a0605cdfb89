"""Mamba-2 (arXiv 2405.21060) as linear attention: q, k and v are its C, B and x. torch only."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .gla_jaxhybrid import chunked_gla
from .linear_attention_jaxhybrid import (
    JaxHybridConvolved,
    JaxHybridGateProjection,
    JaxHybridLinearAttention,
    marked,
)
from .softmax_attention_jaxhybrid import JaxHybridRMSNorm


class JaxHybridGroupNorm(JaxHybridRMSNorm):
    """The norm of the last axis in so many groups of channels, each by itself."""

    def __init__(self, width: int, eps: float, groups: int) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float().unflatten(-1, (self.groups, -1))
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.flatten(-2).to(x.dtype)


class JaxHybridMamba2(JaxHybridConvolved):
    name = "mamba2"
    settings = (*JaxHybridLinearAttention.settings, "ssm_conv_size")
    float32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "dt_proj", "D")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        H, N = config.num_attention_heads, self.num_states
        self.dt_proj = JaxHybridGateProjection(config.hidden_size, N)
        self.A_log = nn.Parameter(torch.zeros(N))
        self.dt_bias = nn.Parameter(torch.ones(N))
        self.D = nn.Parameter(torch.ones(H))
        self.add_convolutions(config, config.linear_settings(self.name, self.settings)["ssm_conv_size"], bias=True)

    def add_output(self, config: JaxHybridConfig, settings: dict[str, Any]) -> None:
        H, K = config.num_attention_heads, self.head_dim
        self.g_proj = nn.Linear(config.hidden_size, H * K, bias=False) if settings["output_gate"] else None
        # An export from before it was written has no head_norm.
        self.norm = JaxHybridGroupNorm(H * K, config.rms_norm_eps, H if settings.get("head_norm") else 1)

    def init_own_weights(self) -> None:
        init.zeros_(self.A_log)  # A = 1, and steps of softplus(-4.6) = 0.01: a half-life of 69 tokens
        init.constant_(self.dt_bias, -4.6)
        init.ones_(self.D)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` and `first` [B,T] as in `marked`; the convolution, too, steps over padding and stops at a start."""
        x, K = hidden_states, self.head_dim
        q, k, v = self.projected(x, position_embeddings)
        with torch.autocast(x.device.type, enabled=False):
            past_inputs, state = self.read(cache)
            q, k, v, last_inputs = self.convolved((q, k, v), past_inputs, real, first)
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
            steps = F.softplus(self.dt_proj(x) + self.dt_bias.float())
            log_decay, k = marked(real, first, -self.A_log.float().exp() * steps, k * steps[..., None])
            skipped = self.D.float()[:, None] * v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
            q = q * K**0.5  # Mamba-2 does not scale
            out = self.recurred(chunked_gla, cache, last_inputs, state, q, k, v, log_decay[..., None])
            out = self.by_head(out) + skipped
            if self.g_proj is not None:
                out = out * F.silu(self.g_proj(x).unflatten(-1, (-1, K)).float())
            out = self.norm(out.flatten(2))
        return self.o_proj(out.to(x.dtype))
