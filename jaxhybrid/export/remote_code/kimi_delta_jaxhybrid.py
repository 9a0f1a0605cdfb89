"""Kimi delta attention (arXiv 2510.26692): a delta rule with a decay for every channel of a key. torch only."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_jaxhybrid import JaxHybridConfig
from .delta_rule_jaxhybrid import JaxHybridDeltaRule
from .dplr_jaxhybrid import chunked_dplr
from .linear_attention_jaxhybrid import JaxHybridGateProjection
from .softmax_attention_jaxhybrid import JaxHybridRMSNorm


class JaxHybridKimiDelta(JaxHybridDeltaRule):
    name = "kimi_delta"
    float32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "a_down_proj", "a_up_proj", "b_proj")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        D, K, N = config.hidden_size, self.head_dim, self.num_states
        rank = config.linear_settings(self.name, self.settings).get("low_rank") or K
        self.a_down_proj = JaxHybridGateProjection(D, rank)
        self.a_up_proj = JaxHybridGateProjection(rank, N * K)
        self.A_log = nn.Parameter(torch.zeros(N))
        self.dt_bias = nn.Parameter(torch.ones(N, K))

    def add_output(self, config: JaxHybridConfig, settings: dict[str, Any]) -> None:
        self.o_norm = JaxHybridRMSNorm(self.head_dim, config.rms_norm_eps)
        self.output_gate = settings["output_gate"]
        if self.output_gate:
            rank = settings.get("low_rank") or self.head_dim
            self.g_down_proj = nn.Linear(config.hidden_size, rank, bias=False)
            self.g_up_proj = nn.Linear(rank, config.num_attention_heads * self.head_dim)

    def init_own_weights(self) -> None:
        init.zeros_(self.A_log)  # A = 1, and steps of softplus(-4.6) = 0.01: a half-life of 69 tokens
        init.constant_(self.dt_bias, -4.6)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.a_up_proj(self.a_down_proj(x)).unflatten(-1, (self.num_states, self.head_dim))
        return -self.A_log.float().exp()[:, None] * F.softplus(logits + self.dt_bias.float())

    def rule(self, q: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(I - b k k') diag(d) S is diag(d) S with what k reads of it taken away along b k."""
        k, v, log_decay, beta, state = inputs
        written = beta[..., None] * k
        return chunked_dplr(q, written, v, log_decay, -log_decay.exp() * k, written, state)

    def gated_output(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.output_gate:
            gate = self.g_up_proj(self.g_down_proj(x))
            out = out * gate.unflatten(-1, (-1, self.head_dim)).float().sigmoid()
        return self.o_proj(out.flatten(2).to(x.dtype))
