"""Which tokens of a call are padding, at which positions they are, and where documents start. torch only.

A row may hold several documents, one after another, which must not see each other. Axes: B batch, T tokens of the call.
A column is a token's place in its row, counted from the first call that filled the cache, padding included.
"""

from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from .configuration_jaxhybrid import JaxHybridConfig


class Layout(NamedTuple):
    """Where the tokens of a call are. `real`, `first` and `start` are None when they would say nothing."""

    positions: torch.Tensor  # [B,T], for the rotary embedding
    real: torch.Tensor | None  # [B,T], False on padding
    first: torch.Tensor | None  # [B,T], True where a new document starts
    start: torch.Tensor | None  # [B,T], the column at which the token's document started
    memory: torch.Tensor  # [B,1,3], for the next call: the last real token's position, `start` there, columns so far


def lay_out(
    tokens: torch.Tensor,
    real: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens: tuple[torch.Tensor | None, torch.Tensor | None],
    seq_idx: torch.Tensor | None,
    memory: torch.Tensor | None,
) -> Layout:
    """The layout of `tokens` [B,T,...], going on from the `memory` of earlier calls (None: there were none).

    A document starts at a real token whose position_ids [B or 1,T] does not go beyond the one before it, or where
    seq_idx [B,T] changes, or where cu_seq_lens say (of queries and of keys), which count over all rows. Positions that
    are not given count from the start of a document.

    Raises:
        ValueError: they disagree, or a shape is wrong.
    """
    B, T = tokens.shape[:2]
    eager = not torch.compiler.is_compiling()  # compiled code cannot look at values
    begun = memory is not None
    if memory is None:
        memory = torch.tensor([[-1, 0, 0]], device=tokens.device).expand(B, 1, 3)
    last, start, columns = memory[:, 0].unbind(1)

    starts = {}
    if position_ids is not None:
        if position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; this input needs {(B, T)}.")
        position_ids = position_ids.to(tokens.device, torch.long).expand(B, T)
        starts["position_ids"] = position_ids <= _before(position_ids, real, last)[:, :-1]
    if seq_idx is not None:
        starts["seq_idx"] = _from_indices(seq_idx, real, B, T)
    if any(lengths is not None for lengths in cu_seq_lens):
        starts["cu_seq_lens_q"] = _from_lengths(*cu_seq_lens, real, B, T)
    if begun and starts.keys() - {"position_ids"}:
        raise ValueError("seq_idx and cu_seq_lens cannot go on from a cache: tell documents apart by position_ids.")
    if real is not None:
        starts = {name: found & real for name, found in starts.items()}
    if eager:
        _refuse_disagreement(starts)
    first = next(iter(starts.values()), None)
    if eager and first is not None and not first.any():
        first = None

    if position_ids is None:
        steps = tokens.new_ones(B, T, dtype=torch.long) if real is None else real.long()
        position_ids = (last[:, None] + steps.cumsum(1)).clamp(min=0)
        if first is not None:
            position_ids = position_ids - torch.where(first, position_ids, 0).cummax(1).values
    start = start[:, None].expand(B, T)
    if first is not None:
        column = columns[:, None] + torch.arange(T, device=tokens.device)
        start = torch.maximum(torch.where(first, column, 0).cummax(1).values, start)
    newest = _before(position_ids, real, last)[:, -1]
    memory = torch.stack([newest, start[:, -1], columns + T], dim=-1)[:, None]
    one_document = first is None and not (begun and (not eager or start.any()))
    return Layout(position_ids, real, first, None if one_document else start, memory)


def is_padding_mask(attention_mask: Any) -> bool:
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def real_tokens(
    config: JaxHybridConfig, tokens: torch.Tensor, attention_mask: Any, columns: int | torch.Tensor
) -> torch.Tensor | None:
    """[B,T], False on padding; None when no mask tells. `columns`: the tokens of a row before this call.

    Raises:
        ValueError: the mask is not one of padding and there are linear layers, or its shape is wrong.
    """
    B, T = tokens.shape[:2]
    if attention_mask is None:
        return None
    if isinstance(attention_mask, dict):  # by type of layer, from `generate`: cut to the new tokens
        mask = attention_mask.get("linear_attention")
        return None if mask is None else mask.bool()
    if is_padding_mask(attention_mask):
        if not torch.compiler.is_compiling() and attention_mask.shape != (B, int(columns) + T):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; {B} rows with {int(columns)} tokens in the "
                f"cache and {T} new ones need {(B, int(columns) + T)}."
            )
        return attention_mask[:, -T:].bool()
    if "linear_attention" in config.layer_types:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: linear attention layers can only leave out whole "
            "tokens; give a padding mask [batch, tokens]."
        )
    return None


def softmax_mask(
    config: JaxHybridConfig,
    tokens: torch.Tensor,
    attention_mask: Any,
    cache: dict[str, Cache | None],
    columns: int | torch.Tensor,
    layout: Layout,
    window: int | None = None,
) -> dict[str, Any]:
    """Arguments of the softmax layers: a mask as their implementation wants it, and what flash attention wants besides.

    `cache` is the cache under transformers' name for it; `window` the tokens that a sliding layer sees.

    Raises:
        ValueError: this implementation, or this cache, would let packed documents see each other.
    """
    if "full_attention" not in config.layer_types:
        return {}
    eager, start = not torch.compiler.is_compiling(), layout.start
    has_linear = "linear_attention" in config.layer_types
    if isinstance(attention_mask, dict):
        if start is not None and eager and has_linear:
            raise ValueError("Packed rows need an attention_mask [batch, tokens], not one for each type of layer.")
        mask = attention_mask["full_attention"]
        if window is None:
            return {"attention_mask": mask}
        if mask is not None:
            return {"attention_mask": _cut_to_window(mask, window, columns)}
        attention_mask, start = None, None  # all tokens before a query, as there is no mask
    if start is not None and eager and not has_linear and None not in cache.values():
        raise ValueError("Without linear layers the cache keeps no account of packed documents: call without one.")
    documents = None
    if start is not None and is_flash_attention_requested(config):
        if start.any():
            return {"attention_mask": None} | _varlen_arguments(layout, begun=int(columns) > 0)
    elif start is not None:
        if config._attn_implementation not in ("eager", "sdpa", "flex_attention"):
            raise ValueError(
                f"attn_implementation {config._attn_implementation!r} is not known to keep packed documents apart; "
                "choose eager, sdpa, flex_attention or flash attention."
            )
        documents = partial(_same_document, start, columns)
    seen = documents if window is None else partial(_in_window, window, documents)
    mask = create_causal_mask(config, tokens, attention_mask, **cache, and_mask_function=seen)
    return {"attention_mask": mask}


def _cut_to_window(mask: Any, window: int, columns: int | torch.Tensor) -> torch.Tensor:
    """A mask [B,1,T,keys] without what is before the windows of its queries."""
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            "Sliding layers take masks by type of layer as tensors only; load the model with "
            'attn_implementation="sdpa" or "eager".'
        )
    query = columns + torch.arange(mask.shape[-2], device=mask.device)
    near = torch.arange(mask.shape[-1], device=mask.device) > query[:, None] - window
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)


def _in_window(window: int, documents: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """For transformers' masks: whether a key is among the last `window` up to its query's own, and of its document."""
    near = key > query - window
    return near if documents is None else near & documents(batch, head, query, key)


def _same_document(
    start: torch.Tensor, columns: int | torch.Tensor, batch: Any, head: Any, query: Any, key: Any
) -> Any:
    """For transformers' masks: whether a key is not before its query's document."""
    return key >= start[batch, query - columns]


def _varlen_arguments(layout: Layout, begun: bool) -> dict[str, Any]:
    """For flash attention the ends of documents, counted over all rows, which must have no padding and no past."""
    if begun or layout.first is None or (layout.real is not None and not layout.real.all()):
        raise ValueError(
            "Flash attention takes packed rows neither with padding nor after the first call of a cache; "
            'load the model with attn_implementation="sdpa".'
        )
    rows = F.pad(layout.first[:, 1:], (1, 0), value=True)
    ends = F.pad(rows.flatten().nonzero().flatten(), (0, 1), value=rows.numel()).to(torch.int32)
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _before(values: torch.Tensor, real: torch.Tensor | None, initial: torch.Tensor) -> torch.Tensor:
    """[B,T+1]: at t what the last real token before t has, `initial` [B] where there is none."""
    padded = torch.cat([initial[:, None], values], dim=1)
    if real is None:
        return padded
    place = torch.arange(1, values.shape[1] + 1, device=values.device)
    return padded.gather(1, F.pad(torch.where(real, place, 0), (1, 0)).cummax(1).values)


def _from_indices(seq_idx: torch.Tensor, real: torch.Tensor | None, B: int, T: int) -> torch.Tensor:
    """[B,T], True where seq_idx differs from the real token before."""
    if seq_idx.shape != (B, T):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; this input needs {(B, T)}.")
    nothing = torch.iinfo(torch.long).min
    seq_idx = seq_idx.long()
    before = _before(seq_idx, real, seq_idx.new_full((B,), nothing))[:, :-1]
    return (seq_idx != before) & (before != nothing)


def _from_lengths(
    cu_seq_lens_q: torch.Tensor | None, cu_seq_lens_k: torch.Tensor | None, real: torch.Tensor | None, B: int, T: int
) -> torch.Tensor:
    """[B,T], True where a document starts inside a row."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k are needed together.")
    ends = cu_seq_lens_q.long()
    first = torch.zeros(B * T + 1, dtype=torch.bool, device=ends.device)
    if not torch.compiler.is_compiling():
        if not torch.equal(ends, cu_seq_lens_k.long()):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: queries and keys are of the same documents here.")
        if ends.ndim != 1 or ends[0] != 0 or ends[-1] != B * T or (ends.diff() < 0).any():
            raise ValueError(f"cu_seq_lens_q must rise from 0 to {B * T}, the tokens of all rows: {ends.tolist()}.")
        if not torch.isin(torch.arange(0, B * T, T, device=ends.device), ends).all():
            raise ValueError(f"cu_seq_lens_q {ends.tolist()} has a document that reaches beyond its row of {T} tokens.")
        if real is not None and not real.all():
            raise ValueError("cu_seq_lens_q is for rows without padding; attention_mask has zeros.")
    first[ends] = True
    return F.pad(first[:-1].reshape(B, T)[:, 1:], (1, 0))


def _refuse_disagreement(starts: dict[str, torch.Tensor]) -> None:
    for (name, found), (other, also) in combinations(starts.items(), 2):
        differ = (found != also).nonzero()
        if len(differ):
            row, token = differ[0].tolist()
            raise ValueError(f"{name} and {other} disagree on whether a document starts at row {row}, token {token}.")
