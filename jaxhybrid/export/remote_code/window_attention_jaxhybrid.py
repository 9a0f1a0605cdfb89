"""Softmax attention to the last tokens of a document and to its first few (arXiv 2309.17453). torch only.

Axes as in softmax_attention_jaxhybrid.py; P places of a state: keys and values of the sinks, then a ring of the window.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .configuration_jaxhybrid import JaxHybridConfig
from .linear_attention_jaxhybrid import JaxHybridStateful
from .softmax_attention_jaxhybrid import JaxHybridProjections, eager_attention_forward

QUERIES = 256  # at once: a mask has so many rows, and a column for each of them and for each place of the state


class Tokens(NamedTuple):
    """Of some tokens of each row, [B,T]; the document that the state belongs to is number 0."""

    document: torch.Tensor  # its number
    number: torch.Tensor  # the token's in its document, counted from 0; padding has that of the token before it
    real: torch.Tensor  # False on padding


class JaxHybridWindowAttention(JaxHybridProjections, JaxHybridStateful):
    """Like the base model's attention, with a state of fixed size."""

    name = "window_attention"

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        settings = config.linear_settings(self.name, ("window", "sinks"))
        self.window, self.sinks = settings["window"], settings["sinks"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        real: torch.Tensor | None,
        first: torch.Tensor | None,
    ) -> torch.Tensor:
        """`real` [B,T] is False on padding, `first` [B,T] True where a document starts; see `marked`."""
        q, k, v = (x.transpose(1, 2) for x in self.projected(hidden_states, position_embeddings))
        B, G, T, K = k.shape
        count, held = self.read(cache)
        count = torch.zeros(B, dtype=torch.long, device=k.device) if count is None else count[:, 0, 0]
        held = k.new_zeros(B, G, self.sinks + self.window, 2 * K) if held is None else held
        real = torch.ones(B, T, dtype=torch.bool, device=k.device) if real is None else real
        first = torch.zeros_like(real) if first is None else first
        new, outputs = torch.cat([k, v], dim=-1), []
        for begin in range(0, T, QUERIES):
            part = slice(begin, begin + QUERIES)
            tokens = self.numbered(real[:, part], first[:, part], count)
            outputs.append(self.attend(q[:, :, part], new[:, :, part], held, tokens, count))
            held, count = self.kept(new[:, :, part], held, tokens, count)
        self.write(cache, count[:, None, None], held)
        return self.o_proj(torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))

    @staticmethod
    def numbered(real: torch.Tensor, first: torch.Tensor, count: torch.Tensor) -> Tokens:
        """Tokens that come after `count` [B] tokens of the document that the state belongs to."""
        first = first & real
        ordinal = real.long().cumsum(1) - 1  # among the real tokens of this piece
        begun = torch.where(first, ordinal, -count[:, None]).cummax(1).values
        return Tokens(first.long().cumsum(1), ordinal - begun, real)

    def attend(
        self, q: torch.Tensor, new: torch.Tensor, held: torch.Tensor, tokens: Tokens, count: torch.Tensor
    ) -> torch.Tensor:
        """q [B,H,T,K] to the state's keys and to those of its own piece: [B,H,T,K]."""
        T, (document, number, real) = q.shape[2], tokens
        place, last = torch.arange(held.shape[2], device=q.device), count[:, None] - 1
        # The newest token that belongs in a place is there; a place beyond the newest of all is empty.
        there = torch.where(place < self.sinks, place, last - (last - place) % self.window)
        before = self.sees(number, there) & (place <= last)[:, None] & (document == 0)[..., None]
        same = (document[..., None] == document[:, None]) & real[:, None]
        causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        own = self.sees(number, number) & same & causal
        own = own | torch.eye(T, dtype=torch.bool, device=q.device)  # padding sees itself, so that it stays finite
        keys, values = torch.cat([held.to(new.dtype), new], dim=2).chunk(2, dim=-1)
        mask = torch.cat([before, own], dim=-1)[:, None]
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.cap is not None:  # sdpa has none
            hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
            out, _ = eager_attention_forward(self, q, keys, values, hidden, self.scaling, dropout, self.cap)
            return out.transpose(1, 2)
        keys, values = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values, mask, dropout_p=dropout, scale=self.scaling)

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[B,T,keys] of numbers [B,T] and [B,keys], which do not ask whether the key is before the query."""
        return (query[..., None] - key[:, None] < self.window) | (key < self.sinks)[:, None]

    def kept(
        self, new: torch.Tensor, held: torch.Tensor, tokens: Tokens, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state after these tokens, of the document that the last of them is in, and how many it has of it."""
        document, number, real = tokens
        is_last = real & (document == document[:, -1:])
        reached = torch.where(is_last, number + 1, 0).amax(1)
        count = torch.where(is_last.any(1), reached, count)
        kept = is_last & ((number < self.sinks) | (number >= count[:, None] - self.window))
        places = torch.where(number < self.sinks, number, self.sinks + (number - self.sinks) % self.window)
        nowhere = held.shape[2]
        index = torch.where(kept, places, nowhere)[:, None, :, None].expand_as(new)
        return F.pad(held, (0, 0, 0, 1)).scatter(2, index, new.to(held.dtype))[:, :, :nowhere], count
