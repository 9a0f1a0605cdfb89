"""Linear attention by the gated delta rule. torch only.

Axes: B batch, T tokens, D model width, H query heads, N states of a layer, R = H / N queries that read one state,
K head width, C chunk, W convolution taps. Projections keep [B,T,heads,K]; the delta rule works on [B,heads,T,K].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .softmax_attention_jaxhybrid import JaxHybridRMSNorm, rotate

CHUNK = 64
L2_EPS = 1e-6
FORGET = -1e4  # log decay at a document's first token: exp is 0, and sums of several stay finite


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


# Parameters that must keep their precision live in modules of our own: what quantizes a model replaces `nn.Linear` and
# `nn.Conv1d`, and what offloads one fills in a parameter when the module that holds it is called.


class JaxHybridGateProjection(nn.Module):
    """x W' in float32, whatever the dtypes of x and W: in 16 bits a slow decay rounds to no decay."""

    def __init__(self, width: int, gates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(gates, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float())


class JaxHybridShortConvolution(nn.Module):
    """Causal depthwise convolution over the real tokens of a document: y_t = sum_w taps[:, w] x_{t-W+1+w}."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, size))

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None, real: torch.Tensor | None, first: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B,T,channels] float32; past [B,channels,W-1], the inputs before x, zeros where there are none.

        real [B,T] is False on padding, which is stepped over as if absent; first [B,T] is True where a document starts.
        Returns y and the last W-1 real inputs of the last document, the `past` of the next call.
        """
        B, T, channels = x.shape
        taps = self.weight.to(x.dtype)
        W = taps.shape[-1]
        past = x.new_zeros(B, channels, W - 1) if past is None else past
        document = None if first is None else first.long().cumsum(1)  # 0: the document that the past belongs to
        order = None
        if real is not None:  # real tokens first, in their order
            order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)
            x = x.gather(1, order[..., None].expand_as(x))
            document = None if document is None else document.gather(1, order)
        inputs = torch.cat([past, x.mT], dim=-1)
        if document is None:
            y = F.conv1d(inputs, taps, groups=channels).mT
        else:
            document = F.pad(document, (W - 1, 0))
            same = document.unfold(1, T, 1) == document[:, None, W - 1 :]  # [B,W,T]: is the input of tap w at t its own
            terms = [taps[:, 0, w, None] * inputs[..., w : w + T] * same[:, None, w] for w in range(W)]
            y = torch.stack(terms).sum(0).mT
        count = torch.full((B,), T, device=x.device) if real is None else real.sum(1)
        kept = count[:, None] + torch.arange(W - 1, device=x.device)  # [B,W-1], columns of `inputs`
        last = inputs.gather(2, kept[:, None].expand(B, channels, W - 1))
        if document is not None:
            newest = document.gather(1, (count + W - 2).clamp(min=0)[:, None])
            last = last * (document.gather(1, kept) == newest)[:, None]
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
        return y, last


class JaxHybridGatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule, behind optional norms, rotation and convolution."""

    q_conv: JaxHybridShortConvolution
    k_conv: JaxHybridShortConvolution
    v_conv: JaxHybridShortConvolution

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        settings = config.gated_deltanet
        D, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
        N = H if settings["expand_kv"] else config.num_key_value_heads
        self.layer_idx = layer_idx
        self.head_dim, self.num_states = K, N
        self.rope, self.conv_size = settings["rope"], settings["conv_size"]
        self.q_proj = nn.Linear(D, H * K, bias=settings["qkv_bias"])
        self.k_proj = nn.Linear(D, N * K, bias=settings["qkv_bias"])
        self.v_proj = nn.Linear(D, N * K, bias=settings["qkv_bias"])
        self.a_proj = JaxHybridGateProjection(D, N)
        self.b_proj = JaxHybridGateProjection(D, N)
        self.A_log = nn.Parameter(torch.zeros(N))
        self.dt_bias = nn.Parameter(torch.ones(N))
        self.g_proj = nn.Linear(D, H * K, bias=False) if settings["output_gate"] else None
        self.o_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.qk_norm = settings["qk_norm"]
        if self.qk_norm:
            self.q_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
            self.k_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
        if self.conv_size:
            for name, channels in (("q_conv", H * K), ("k_conv", N * K), ("v_conv", N * K)):
                setattr(self, name, JaxHybridShortConvolution(channels, self.conv_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` [B,T] is False on padding, which neither writes nor decays the state nor enters the convolution.

        `first` [B,T] is True where a document starts: with an empty state and no inputs before it.
        """
        x, K, N = hidden_states, self.head_dim, self.num_states
        B, T, _ = x.shape
        q, k, v = (proj(x).unflatten(-1, (-1, K)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)

        with torch.autocast(x.device.type, enabled=False):
            past_inputs, state = self._read(cache)
            q, k, v = q.float(), k.float(), v.float()
            last_inputs = q.new_zeros(B, 1, 1)  # what a layer without convolution keeps: see `_write`
            if self.conv_size:
                convs, inputs = (self.q_conv, self.k_conv, self.v_conv), [x.flatten(2) for x in (q, k, v)]
                pasts = [None] * 3 if past_inputs is None else past_inputs.split([x.shape[2] for x in inputs], dim=1)
                convolved = [conv(x, past, real, first) for conv, x, past in zip(convs, inputs, pasts)]
                q, k, v = (y.unflatten(-1, (-1, K)) for y, _ in convolved)
                last_inputs = torch.cat([last for _, last in convolved], dim=1)
            q, k, v = l2_normalize(F.silu(q)), l2_normalize(F.silu(k)), F.silu(v)
            log_decay = -self.A_log.float().exp() * F.softplus(self.a_proj(x) + self.dt_bias.float())
            beta = self.b_proj(x).sigmoid()
            if first is not None:
                log_decay = log_decay.masked_fill(first[..., None], FORGET)
            if real is not None:
                log_decay, beta = log_decay * real[..., None], beta * real[..., None]

            if state is None:
                state = q.new_zeros(B, N, K, K)
            rule = gated_delta_rule_step if T == 1 else chunked_gated_delta_rule
            q = q.unflatten(2, (N, -1)).permute(0, 2, 3, 1, 4) * K**-0.5
            k, v, log_decay, beta = (x.transpose(1, 2) for x in (k, v, log_decay, beta))
            out, state = rule(q, k, v, log_decay, beta, state)
            self._write(cache, last_inputs, state)
            out = self.o_norm(out.permute(0, 3, 1, 2, 4).flatten(2, 3))  # [B,T,H,K]

        if self.g_proj is not None:
            out = out * F.silu(self.g_proj(x).unflatten(-1, (-1, K)).float())
        return self.o_proj(out.flatten(2).to(x.dtype))

    def _read(self, cache: Cache | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if cache is None or not cache.has_previous_state(self.layer_idx, state_idx=0):
            return None, None
        layer: Any = cache.layers[self.layer_idx]
        return layer.conv_states[0], layer.recurrent_states[0]

    def _write(self, cache: Cache | None, last_inputs: torch.Tensor, state: torch.Tensor) -> None:
        if cache is not None:  # both in float32; from its convolution state the cache learns that it has a past
            cache.update_conv_state(last_inputs, self.layer_idx)
            cache.update_recurrent_state(state, self.layer_idx)
