"""Gated Linear Attention (arXiv 2312.06635): a decay of its own for every channel of a key. torch only.

Axes as in linear_attention_jaxhybrid.py; C chunk.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .linear_attention_jaxhybrid import JaxHybridGateProjection, JaxHybridLinearAttention, marked

CHUNK = 16  # decays between all pairs of a chunk's tokens are held for every channel
NORMALIZER = 16


def chunked_gla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t', o_t = S_t' q_t, in chunks.

    q [B,N,R,T,K] already scaled, k and v [B,N,T,K], log_decay [B,N,T,K] or [B,N,T,1], state [B,N,K,K]; all float32.
    Returns o [B,N,R,T,K] and the state after the last token.
    """
    T = q.shape[3]
    outputs = []
    for begin in range(0, T, CHUNK):
        chunk = slice(begin, min(begin + CHUNK, T))
        q_chunk, (k_chunk, v_chunk, decays) = q[..., chunk, :], (x[:, :, chunk] for x in (k, v, log_decay))
        C = k_chunk.shape[2]
        # between[i, j] = a_{j+1} .. a_i, summed from j on: differences of sums from the start round by their size.
        past = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)[..., None]
        between = torch.where(past, decays[:, :, :, None], 0).cumsum(2).masked_fill(past.transpose(0, 1), float("-inf"))
        between = between.exp()  # [B,N,C,C,K]
        from_start = decays.cumsum(2).exp()
        scores = torch.einsum("bnric,bnjc,bnijc->bnrij", q_chunk, k_chunk, between)
        read = (q_chunk * from_start[:, :, None]) @ state[:, :, None]
        outputs.append(read + scores @ v_chunk[:, :, None])
        state = from_start[:, :, -1, :, None] * state + (k_chunk * between[:, :, -1]).mT @ v_chunk
    return torch.cat(outputs, dim=3), state


class JaxHybridGLA(JaxHybridLinearAttention):
    """Gated linear attention with a decay of low rank, behind optional norms and rotation."""

    name = "gla"
    settings = (*JaxHybridLinearAttention.settings, "decay_rank")
    float32: ClassVar[tuple[str, ...]] = ("a_down_proj", "a_up_proj")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        rank = config.linear_settings(self.name, self.settings)["decay_rank"]
        self.a_down_proj = JaxHybridGateProjection(config.hidden_size, rank)
        self.a_up_proj = JaxHybridGateProjection(rank, self.num_states * self.head_dim, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` and `first` [B,T] as in `marked`."""
        x, K, N = hidden_states, self.head_dim, self.num_states
        q, k, v = self.projected(x, position_embeddings)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            log_decay = F.logsigmoid(self.a_up_proj(self.a_down_proj(x))).unflatten(-1, (N, K)) / NORMALIZER
            log_decay, k = marked(real, first, log_decay, k)
            _, state = self.read(cache)
            out = self.recurred(chunked_gla, cache, self.nothing_kept(q), state, q, k, v, log_decay)
            out = self.normed(out)
        return self.gated_output(out, x)
