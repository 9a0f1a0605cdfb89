"""Gated DeltaNet (arXiv 2412.06464): a delta rule with a decay for each state. torch only."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_jaxhybrid import JaxHybridConfig
from .delta_rule_jaxhybrid import JaxHybridDeltaRule
from .linear_attention_jaxhybrid import JaxHybridGateProjection


class JaxHybridGatedDeltaNet(JaxHybridDeltaRule):
    name = "gated_deltanet"
    float32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "a_proj", "b_proj")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.a_proj = JaxHybridGateProjection(config.hidden_size, self.num_states)
        self.A_log = nn.Parameter(torch.zeros(self.num_states))
        self.dt_bias = nn.Parameter(torch.ones(self.num_states))

    def init_own_weights(self) -> None:
        init.zeros_(self.A_log)  # A = 1, and steps of softplus(-4.6) = 0.01: a half-life of 69 tokens
        init.constant_(self.dt_bias, -4.6)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        return -self.A_log.float().exp() * F.softplus(self.a_proj(x) + self.dt_bias.float())
