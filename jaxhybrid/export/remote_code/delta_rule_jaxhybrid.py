"""Linear attention by a delta rule: what its mixers share. torch only.

Axes as in linear_attention_jaxhybrid.py; C chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .linear_attention_jaxhybrid import (
    JaxHybridConvolved,
    JaxHybridGateProjection,
    JaxHybridLinearAttention,
    marked,
)

CHUNK = 64
L2_EPS = 1e-6


def chunked_gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t', o_t = S_t' q_t, in chunks (arXiv 2412.06464, section 3.3).

    q [B,N,R,T,K] already scaled, k and v [B,N,T,K], log_decay and beta [B,N,T], state [B,N,K,K]; all float32.
    Returns o [B,N,R,T,K] and the state after the last token. Within a chunk the corrected values solve the unit lower
    triangular system (I + tril(b_i a_i..a_j k_i.k_j)) u = b (v - decay k S), exactly.
    """
    B, N, R, T, K = q.shape
    padding = -T % CHUNK if T > CHUNK else 0
    if padding:  # keys of zero, beta 0 and decay 1 leave the state as it is
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        log_decay, beta = (F.pad(x, (0, padding)) for x in (log_decay, beta))
    C = min(T, CHUNK)
    q = q.reshape(B, N, R, -1, C, K)
    k, v = (x.reshape(B, N, -1, C, K) for x in (k, v))
    beta = beta.reshape(B, N, -1, C, 1)
    log_decay = log_decay.reshape(B, N, -1, C)

    # between[i, j] = a_{j+1} .. a_i, summed from j on: a difference of sums from the start would round by their size.
    past = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)
    between = torch.where(past, log_decay[..., None], 0).cumsum(-2).masked_fill(past.mT, float("-inf")).exp()
    from_start = log_decay.cumsum(-1).exp()[..., None]
    system = beta * (k @ k.mT) * between  # the solver reads below the diagonal only and takes ones on it
    inverse = torch.linalg.solve_triangular(
        system, torch.eye(C, dtype=q.dtype, device=q.device).expand_as(system), upper=False, unitriangular=True
    )
    k_read = k * from_start
    scores = (q @ k[:, :, None].mT) * between[:, :, None]
    q_read = q * from_start[:, :, None]
    k_written = (k * between[..., -1, :, None]).mT
    chunk_decay = from_start[..., -1:, :]

    outputs = []
    for c in range(k.shape[2]):
        # The difference first, the inverse after: the other order subtracts two larger numbers.
        u = inverse[:, :, c] @ (beta[:, :, c] * (v[:, :, c] - k_read[:, :, c] @ state))
        outputs.append(q_read[:, :, :, c] @ state[:, :, None] + scores[:, :, :, c] @ u[:, :, None])
        state = chunk_decay[:, :, c] * state + k_written[:, :, c] @ u
    return torch.cat(outputs, dim=3)[:, :, :, :T], state


def gated_delta_rule_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunked_gated_delta_rule` for a single token: T = 1."""
    state = log_decay.exp()[..., None] * state
    correction = beta[..., None] * (v - k @ state)
    state = state + k.mT @ correction
    return q @ state[:, :, None], state


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class JaxHybridDeltaRule(JaxHybridConvolved):
    """The delta rule behind optional norms, rotation and convolution; a subclass gives `log_decay`."""

    settings = (*JaxHybridLinearAttention.settings, "conv_size")

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.b_proj = JaxHybridGateProjection(config.hidden_size, self.num_states)
        self.add_convolutions(config, config.linear_settings(self.name, self.settings)["conv_size"])

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """[B,T,N], or what `rule` takes, in float32."""
        raise NotImplementedError

    def rule(self, q: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The recurrence: see `chunked_gated_delta_rule`."""
        return gated_delta_rule_step(q, *inputs) if q.shape[3] == 1 else chunked_gated_delta_rule(q, *inputs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` and `first` [B,T] as in `marked`; the convolution, too, steps over padding and stops at a start."""
        x = hidden_states
        q, k, v = self.projected(x, position_embeddings)
        with torch.autocast(x.device.type, enabled=False):
            past_inputs, state = self.read(cache)
            q, k, v, last_inputs = self.convolved((q, k, v), past_inputs, real, first)
            q, k, v = l2_normalize(F.silu(q)), l2_normalize(F.silu(k)), F.silu(v)
            log_decay, beta = marked(real, first, self.log_decay(x), self.b_proj(x).sigmoid())
            out = self.recurred(self.rule, cache, last_inputs, state, q, k, v, log_decay, beta)
            out = self.normed(out)
        return self.gated_output(out, x)
