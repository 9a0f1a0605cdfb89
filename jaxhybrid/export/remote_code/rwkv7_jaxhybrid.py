"""RWKV-7 as RADLADS adapts it (arXiv 2503.14456, 2505.03005), without the value residual. torch only."""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .dplr_jaxhybrid import chunked_dplr
from .linear_attention_jaxhybrid import (
    JaxHybridGateProjection,
    JaxHybridLinearAttention,
    marked,
    published_rank,
)

FASTEST = math.exp(-0.5)  # of -log decay
LENGTH_EPS = 1e-12


class JaxHybridRWKV7(JaxHybridLinearAttention):
    name = "rwkv7"
    float32: ClassVar[tuple[str, ...]] = (
        "a_down_proj", "a_up_proj", "decay_bias", "r_down_proj", "r_up_proj", "rate_bias", "removal",
    )  # fmt: skip

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        D, K, N = config.hidden_size, self.head_dim, self.num_states
        rank = config.linear_settings(self.name, self.settings).get("low_rank") or published_rank(1.8, D, 0.5)
        self.a_down_proj, self.r_down_proj = (JaxHybridGateProjection(D, rank) for _ in range(2))
        self.a_up_proj, self.r_up_proj = (JaxHybridGateProjection(rank, N * K) for _ in range(2))
        self.decay_bias = nn.Parameter(torch.zeros(N, K))
        self.rate_bias = nn.Parameter(torch.zeros(N, K))
        self.removal = nn.Parameter(torch.ones(N, K))

    def add_output(self, config: JaxHybridConfig, settings: dict[str, Any]) -> None:
        self.output_gate = settings["output_gate"]
        if self.output_gate:
            rank = settings.get("low_rank") or published_rank(0.6, config.hidden_size, 0.8)
            self.g_down_proj = nn.Linear(config.hidden_size, rank, bias=False)
            self.g_up_proj = nn.Linear(rank, config.num_attention_heads * self.head_dim, bias=False)

    def init_own_weights(self) -> None:
        init.constant_(self.decay_bias, -4.1)  # -log decay of 0.01: a half-life of 69 tokens
        init.zeros_(self.rate_bias)
        init.constant_(self.removal, 0.85)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` and `first` [B,T] as in `marked`."""
        x, per_channel = hidden_states, (self.num_states, self.head_dim)
        q, k, v = self.projected(x, position_embeddings)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            decays = self.a_up_proj(self.a_down_proj(x).tanh()).unflatten(-1, per_channel) + self.decay_bias.float()
            log_decay = -FASTEST * decays.sigmoid()
            rates = self.r_up_proj(self.r_down_proj(x)).unflatten(-1, per_channel) + self.rate_bias.float()
            rate = rates.sigmoid()
            removed = k * self.removal.float()
            removed = removed * torch.rsqrt(removed.square().sum(-1, keepdim=True) + LENGTH_EPS)
            k = k * (rate - torch.expm1(log_decay))
            read = -removed if first is None else -removed.masked_fill(first[..., None, None], 0)
            log_decay, k, read, removed = marked(real, first, log_decay, k, read, removed * rate)
            _, state = self.read(cache)
            last_inputs = self.nothing_kept(q)
            out = self.by_head(
                self.recurred(chunked_dplr, cache, last_inputs, state, q, k, v, log_decay, read, removed)
            )
        if self.output_gate:
            gate = self.g_up_proj(self.g_down_proj(x).sigmoid())
            out = out * gate.unflatten(-1, (-1, self.head_dim)).float()
        return self.o_proj(out.flatten(2).to(x.dtype))
