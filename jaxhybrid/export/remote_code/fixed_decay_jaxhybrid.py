"""Fixed decays, one a state: RetNet (arXiv 2307.08621), lightning attention (arXiv 2501.08313). torch only."""

import math

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .gla_jaxhybrid import chunked_gla
from .linear_attention_jaxhybrid import JaxHybridLinearAttention, marked


class JaxHybridFixedDecay(JaxHybridLinearAttention):
    name = "fixed_decay"
    settings = (*JaxHybridLinearAttention.settings, "form", "decay_init")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        settings = config.linear_settings(self.name, self.settings)
        self.form, self.is_slow = settings["form"], settings["decay_init"] == "slow"
        if self.form not in ("lightning", "retnet"):
            raise ValueError(f"fixed_decay has form {self.form!r}; known: lightning, retnet.")

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid() if self.form == "lightning" else F.silu(x)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """[N] float32"""
        N = self.num_states
        heads = torch.arange(N, device=x.device, dtype=torch.float32)
        if self.is_slow:  # half-lives of 64 to 4096 tokens
            return -math.log(2) * torch.linspace(-math.log(64), -math.log(4096), N, device=x.device).exp()
        if self.form == "lightning":
            return -torch.exp2(-8 * (heads + 1) / N)
        return torch.log1p(-torch.exp2(-5 - heads))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` and `first` [B,T] as in `marked`."""
        x = hidden_states
        q, k, v = self.projected(x, position_embeddings)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            if self.form == "lightning":
                q, k, v = F.silu(q), F.silu(k), F.silu(v)
            log_decay, k = marked(real, first, self.log_decay(x).expand(*x.shape[:2], -1), k)
            _, state = self.read(cache)
            out = self.recurred(chunked_gla, cache, self.nothing_kept(q), state, q, k, v, log_decay[..., None])
            out = self.normed(out)
        return self.gated_output(out, x)
