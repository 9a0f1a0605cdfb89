"""RWKV-6 as RADLADS adapts it (arXiv 2404.05892, 2505.03005). torch only."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .gla_jaxhybrid import chunked_gla
from .linear_attention_jaxhybrid import (
    JaxHybridGateProjection,
    JaxHybridLinearAttention,
    causal_convolution,
    marked,
    published_rank,
)

LEAST_LOG_DECAY = -5.0
STREAMS = ("r", "k", "v", "w", "g")


class JaxHybridTokenShift(nn.Module):
    """x moved towards the token before it in its document, once for each of `STREAMS`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(width))
        self.down_proj = nn.Linear(width, len(STREAMS) * rank, bias=False)
        for name in STREAMS:
            setattr(self, f"{name}_mix", nn.Parameter(torch.zeros(width)))
            setattr(self, f"{name}_up_proj", nn.Linear(rank, width, bias=False))

    def init_own_weights(self) -> None:
        init.ones_(self.mix)
        for name in STREAMS:
            init.zeros_(getattr(self, f"{name}_mix"))

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None, real: torch.Tensor | None, first: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One x for each stream, and the last input [B,D,1] float32, the `past` of the next call."""
        with torch.autocast(x.device.type, enabled=False):
            token_before = torch.tensor([[[1.0, 0.0]]], dtype=torch.float32, device=x.device)
            taps = token_before.expand(x.shape[-1], 1, 2)
            shifted, last = causal_convolution(x.float(), taps, past, real, first)
            delta = (shifted - x.float()).to(x.dtype)
        low = self.down_proj(x + delta * self.mix).tanh().chunk(len(STREAMS), dim=-1)
        amounts = (getattr(self, f"{name}_mix") + getattr(self, f"{name}_up_proj")(y) for name, y in zip(STREAMS, low))
        return [x + delta * amount for amount in amounts], last


class JaxHybridRWKV6(JaxHybridLinearAttention):
    name = "rwkv6"
    float32: ClassVar[tuple[str, ...]] = ("a_down_proj", "a_up_proj", "decay_bias")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        D, K, N = config.hidden_size, self.head_dim, self.num_states
        given = config.linear_settings(self.name, self.settings).get("low_rank")
        rank = given or published_rank(1.8, D, 0.5)
        self.shift = JaxHybridTokenShift(D, given or published_rank(0.6, D, 0.8))
        self.a_down_proj = JaxHybridGateProjection(D, rank)
        self.a_up_proj = JaxHybridGateProjection(rank, N * K)
        self.decay_bias = nn.Parameter(torch.zeros(N, K))

    def add_output(self, config: JaxHybridConfig, settings: dict[str, Any]) -> None:
        width = config.num_attention_heads * self.head_dim
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False) if settings["output_gate"] else None

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()

    def init_own_weights(self) -> None:
        init.constant_(self.decay_bias, -4.6)  # -log decay of exp(-4.6) = 0.01: a half-life of 69 tokens
        self.shift.init_own_weights()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` and `first` [B,T] as in `marked`; the token before is the last real one of the document."""
        N, K = self.num_states, self.head_dim
        last_inputs, state = self.read(cache)
        (x_r, x_k, x_v, x_w, x_g), last_inputs = self.shift(hidden_states, last_inputs, real, first)
        q, k, v = self.projected((x_r, x_k, x_v), position_embeddings)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            logits = self.a_up_proj(self.a_down_proj(x_w).tanh()).unflatten(-1, (N, K)) + self.decay_bias.float()
            log_decay = (-logits.exp()).clamp(min=LEAST_LOG_DECAY)
            log_decay, k = marked(real, first, log_decay, k * -torch.expm1(log_decay))
            out = self.recurred(chunked_gla, cache, last_inputs, state, q, k, v, log_decay)
        return self.gated_output(self.by_head(out), x_g)
