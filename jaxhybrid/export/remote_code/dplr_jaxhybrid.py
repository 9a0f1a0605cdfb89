"""The recurrence with a transition that is a diagonal plus rank one: RWKV-7's, and Kimi delta attention's. torch only.

Axes as in linear_attention_jaxhybrid.py; C chunk.
"""

import torch
import torch.nn.functional as F

CHUNK = 16  # decays between all pairs of a chunk's tokens are held for every channel


def chunked_dplr(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = diag(d_t) S_{t-1} + b_t (a_t' S_{t-1}) + k_t v_t', o_t = S_t' q_t, in chunks.

    q [B,N,R,T,K] already scaled, the others [B,N,T,K], state [B,N,K,K]; all float32. Returns o [B,N,R,T,K] and the
    state after the last token. What a chunk's tokens read, u_t = a_t' S_{t-1}, solves a unit lower triangular system.
    """
    T = q.shape[3]
    outputs = []
    for begin in range(0, T, CHUNK):
        chunk = slice(begin, min(begin + CHUNK, T))
        q_chunk, (k_, v_, decays, a_, b_) = q[..., chunk, :], (x[:, :, chunk] for x in (k, v, log_decay, a, b))
        C = k_.shape[2]
        # between[i, j] = d_{j+1} .. d_i, summed from j on: differences of sums from the start round by their size.
        past = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)[..., None]
        between = torch.where(past, decays[:, :, :, None], 0).cumsum(2).masked_fill(past.transpose(0, 1), float("-inf"))
        between = between.exp()  # [B,N,C,C,K]
        before = F.pad(between[:, :, :-1], (0, 0, 0, 0, 1, 0))  # d_{j+1} .. d_{i-1}, zero from j = i on
        since = decays.cumsum(2)
        from_start, to_here = since.exp(), F.pad(since[:, :, :-1], (0, 0, 1, 0)).exp()
        of_k, of_b = (torch.einsum("bnic,bnjc,bnijc->bnij", a_, x, before) for x in (k_, b_))
        read = (a_ * to_here) @ state + of_k @ v_
        u = torch.linalg.solve_triangular(-of_b, read, upper=False, unitriangular=True)
        q_k, q_b = (torch.einsum("bnric,bnjc,bnijc->bnrij", q_chunk, x, between) for x in (k_, b_))
        out = (q_chunk * from_start[:, :, None]) @ state[:, :, None]
        outputs.append(out + q_k @ v_[:, :, None] + q_b @ u[:, :, None])
        last = between[:, :, -1]
        state = from_start[:, :, -1, :, None] * state + (k_ * last).mT @ v_ + (b_ * last).mT @ u
    return torch.cat(outputs, dim=3), state
