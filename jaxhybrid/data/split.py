"""Held-out text taken from the training source, when no source of its own is given."""

from dataclasses import replace
from itertools import islice
from typing import overload

import numpy as np

from jaxhybrid.data.streaming import TokenStream
from jaxhybrid.data.tokens import TokenDataset
from jaxhybrid.errors import DataError


@overload
def take_heldout(data: TokenDataset, tokens: int) -> tuple[TokenDataset, TokenDataset]: ...
@overload
def take_heldout(data: TokenStream, tokens: int) -> tuple[TokenStream, TokenDataset]: ...
def take_heldout(
    data: TokenDataset | TokenStream, tokens: int
) -> tuple[TokenDataset, TokenDataset] | tuple[TokenStream, TokenDataset]:
    """Splits whole documents into (train, held-out), held-out being at least `tokens` tokens.

    A dataset gives the documents whose text hashes lowest, so the choice depends on the text alone; a stream gives its
    first documents. Either way copies of a held-out document, and other pieces of it, are left out of train.

    Raises DataError when held-out would take more than half of a dataset, or all of a stream.
    """
    if tokens < 1:
        raise DataError(f"Held-out tokens {tokens} must be at least 1.")
    if isinstance(data, TokenStream):
        return _from_stream(data, tokens)
    by_hash = np.argsort(data.hashes, kind="stable")
    reached = np.cumsum(data.lengths[by_hash])
    last = int(np.searchsorted(reached, tokens))  # first document with which `tokens` are reached
    if last < len(data):
        held = data.hashes <= data.hashes[by_hash[last]]
        held_tokens = int(data.lengths[held].sum())
    if last == len(data) or held_tokens > data.num_tokens // 2:
        raise DataError(
            f"Holding out {tokens:,} tokens would take more than half of {data.name!r}, which has "
            f"{data.num_tokens:,} in {len(data):,} documents; lower data.heldout_tokens or set data.heldout."
        )
    heldout = data.select(np.flatnonzero(held), f"{data.name} (held out)")
    return without(data, heldout.hashes), heldout


@overload
def without(data: TokenDataset, hashes: np.ndarray) -> TokenDataset: ...
@overload
def without(data: TokenStream, hashes: np.ndarray) -> TokenStream: ...
def without(data: TokenDataset | TokenStream, hashes: np.ndarray) -> TokenDataset | TokenStream:
    """`data` without the documents whose text has one of these hashes. Raises DataError if none is left."""
    if isinstance(data, TokenStream):
        return replace(data, excluded=data.excluded | frozenset(hashes.tolist()))
    kept = np.flatnonzero(~np.isin(data.hashes, hashes))
    if not len(kept):
        raise DataError(f"Every document of {data.name!r} is also held out; give data.heldout other text.")
    return data.select(kept, data.name)


def _from_stream(stream: TokenStream, tokens: int) -> tuple[TokenStream, TokenDataset]:
    pieces, hashes, total = [], [], 0
    for piece in stream.pieces():
        pieces.append(piece.ids)
        hashes.append(piece.text_hash)
        total += len(piece.ids)
        if total >= tokens:
            break
    train = without(stream, np.array(hashes, np.uint64))
    if total < tokens or not list(islice(train.pieces(), 1)):
        raise DataError(f"Holding out {tokens:,} tokens would take all of {stream.name!r}; lower data.heldout_tokens.")
    lengths = np.array([len(ids) for ids in pieces], np.int64)
    heldout = TokenDataset(
        np.concatenate(pieces),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(hashes, np.uint64),
        stream.vocabulary.fingerprint,
        f"{stream.name} (held out)",
    )
    return train, heldout
