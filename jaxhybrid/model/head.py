"""The output head, split over the vocabulary: every device has some columns, and no device all of them.

The tokens of all devices that share the head come to its columns, instead of the columns to the tokens: logits of a
chunk of tokens are one matrix, of which each device makes its own columns.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid.model.layers import capped, exact_dtype
from jaxhybrid.model.partition import (
    SHARDS,
    axis_index,
    axis_size,
    differing,
    exchanged,
    joined,
    largest,
    shards,
    total,
)

NO_WORD = -1e30  # logit of a column that is padding; finite, so that differences are
SHARERS = (*SHARDS, "tensor")  # the devices that share a head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Head:
    """What makes logits of final hidden states."""

    kernel: jax.Array  # [D,S]
    cap: float | None = field(default=None, metadata={"static": True})  # z becomes cap * tanh(z / cap)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def astype(self, dtype: Any) -> "Head":
        return Head(self.kernel.astype(dtype), self.cap)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Columns:
    """This device's columns of a head."""

    weight: jax.Array  # [D,s]
    numbers: jax.Array  # [s] int32: which token each is; vocab_size and more where it is padding
    cap: float | None = field(metadata={"static": True})  # of the head

    def logits(self, hidden_ND: jax.Array, vocab_size: int) -> jax.Array:
        """[N,s], in float32 or wider, of tokens that all sharers hold alike (`gathered`)."""
        with jax.named_scope("head"):
            logits = jnp.dot(hidden_ND, self.weight, preferred_element_type=exact_dtype(hidden_ND.dtype))
        return self._finished(logits, vocab_size)

    def before_cap(self, gradient: jax.Array, logits: jax.Array) -> jax.Array:
        """The gradient for the products of states and weights, from that for the logits which came of them."""
        if self.cap is None:
            return gradient
        return jnp.where(logits > NO_WORD, gradient * (1 - (logits / self.cap) ** 2), 0)

    def _finished(self, logits: jax.Array, vocab_size: int) -> jax.Array:
        logits = capped(logits, self.cap)
        is_padded = self.numbers.shape[0] * shards() * axis_size("tensor") > vocab_size
        return jnp.where(self.numbers < vocab_size, logits, NO_WORD) if is_padded else logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TiedColumns(Columns):
    """Those of an embedding that is the head, as it lies: `weight` is [s,D].

    A loop would be given its transpose, and that one is made: a second head.
    """

    def logits(self, hidden_ND: jax.Array, vocab_size: int) -> jax.Array:
        with jax.named_scope("head"):
            exact = exact_dtype(hidden_ND.dtype)
            logits = jnp.einsum("nd,sd->ns", hidden_ND, self.weight, preferred_element_type=exact)
        return self._finished(logits, vocab_size)


def own_columns(head: Head, vocab_size: int, dtype: Any) -> Columns:
    """The columns of this device, from the part of the head that it stores: some rows, and some columns if the
    vocabulary is split over `tensor`. The devices that share it exchange rows for columns."""
    first, devices = jnp.int32(0), axis_size("tensor")
    head_DS = differing(head.kernel, "data")
    if devices > 1 and head_DS.shape[1] == vocab_size:  # each takes its share of columns that all have
        share = -(-vocab_size // devices)
        first, head_DS = axis_index("tensor") * share, _padded(head_DS, devices * share)
        head_DS = jax.lax.dynamic_slice_in_dim(differing(head_DS, "tensor"), first, share, 1)
    else:
        first = axis_index("tensor") * head_DS.shape[1]
    stored = head_DS.shape[1]
    share = -(-stored // shards())
    places = axis_index(*SHARDS) * share + jnp.arange(share)
    numbers = jnp.where(places < stored, first + places, vocab_size)
    weight = exchanged(_padded(head_DS.astype(dtype), share * shards()), split=1, join=0)
    return Columns(weight, numbers, head.cap)


def _padded(x: jax.Array, columns: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, columns - x.shape[1])))


def gathered(x: jax.Array) -> jax.Array:
    """[n,...] of this device's tokens -> [N,...] of all sharers' tokens, the same on each of them."""
    return joined(x, 0, *SHARDS)


def own_tokens(x: jax.Array) -> jax.Array:
    """The reverse of `gathered`."""
    own = x.shape[0] // shards()
    return jax.lax.dynamic_slice_in_dim(x, axis_index(*SHARDS) * own, own)


def in_chunks(arrays: Any, chunk_tokens: int) -> Any:
    """[n,...] -> [chunks, C, ...], zero-padded. The tokens of all devices that share the head
    come together in a chunk, so each brings fewer where there are many."""
    largest_chunk = math.ceil(4 * chunk_tokens / max(shards(), 4))

    def split(x: jax.Array) -> jax.Array:
        size = min(largest_chunk, x.shape[0])
        chunks = math.ceil(x.shape[0] / size)
        x = jnp.pad(x, ((0, chunks * size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, arrays)


def log_partition(logits: jax.Array) -> jax.Array:
    """log sum exp over the whole vocabulary, [N]."""
    top = largest(jnp.max(logits, -1), *SHARERS)
    return top + jnp.log(total(jnp.sum(jnp.exp(logits - top[:, None]), -1), *SHARERS))


def chosen(logits: jax.Array, numbers: jax.Array, tokens: jax.Array) -> jax.Array:
    """The logit of one token each, [N]."""
    return total(jnp.sum(jnp.where(numbers[None] == tokens[:, None], logits, 0), -1), *SHARERS)


def most_likely(logits: jax.Array, numbers: jax.Array) -> jax.Array:
    """The token of the largest logit, [N] int32; the lowest of equal ones."""
    top = jnp.max(logits, -1)
    number = numbers[jnp.argmax(logits, -1)]
    candidate = jnp.where(top == largest(top, *SHARERS), number, jnp.iinfo(jnp.int32).max)
    return -largest(-candidate, *SHARERS)


def whole(logits: jax.Array, vocab_size: int) -> jax.Array:
    """[N,s] of this device's columns for all sharers' tokens -> [n,S] of its own tokens over the whole vocabulary."""
    own, devices = exchanged(logits, split=0, join=1), axis_size("tensor")
    per_device = -(-vocab_size // devices)
    # The exchange has its padding at the end of each `tensor` device's part, the vocabulary at the end of all.
    part = jax.lax.dynamic_update_slice_in_dim(
        jnp.zeros((own.shape[0], per_device * devices), own.dtype) + 0 * own[:1, :1],
        own[:, :per_device], axis_index("tensor") * per_device, 1,
    )  # fmt: skip
    return total(part, "tensor")[:, :vocab_size]
