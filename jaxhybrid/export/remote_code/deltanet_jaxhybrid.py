"""DeltaNet (arXiv 2406.06484): a delta rule without a decay. torch only."""

from typing import ClassVar

import torch

from .delta_rule_jaxhybrid import JaxHybridDeltaRule


class JaxHybridDeltaNet(JaxHybridDeltaRule):
    name = "deltanet"
    float32: ClassVar[tuple[str, ...]] = ("b_proj",)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*x.shape[:2], self.num_states, dtype=torch.float32, device=x.device)
