"""Held-out text: perplexity, KL to the teacher both ways, agreement with its choice; each by position, too.

A model that forgets is worse where more has gone before: figures of a whole text hide that, those of late positions
show it.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import DataError
from jaxhybrid.evaluate.bootstrap import resampled
from jaxhybrid.losses import next_token_targets
from jaxhybrid.model.head import Head, chosen, gathered, in_chunks, log_partition, most_likely, own_columns, own_tokens
from jaxhybrid.model.partition import ROWS, active_mesh, batch_spec, head_spec, on_shards, splits_tokens, total
from jaxhybrid.model.transformer import Model, outputs
from jaxhybrid.stages.batch import Batch, token_mask
from jaxhybrid.train.placement import place_batch

TOKENS_AT_ONCE = 1024  # whose logits are held, of both models
SHORTEST, MOST = 32, 8  # of the buckets of positions: the first one's end at least, and how many at most
SUMS = ("cross_entropy", "predicted", "kl", "kl_reverse", "agreement", "tokens")  # the last axis of all sums
# figure -> what is divided by what
FIGURES = {
    "perplexity": ("cross_entropy", "predicted"),
    "kl": ("kl", "tokens"),
    "kl_reverse": ("kl_reverse", "tokens"),
    "agreement": ("agreement", "tokens"),
}

Hidden = tuple[jax.Array, Head]  # what `outputs` gives: hidden states [B,T,D], head


def compare_quality(
    models: dict[str, Model], batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, dtype: Any = jnp.bfloat16
) -> dict[str, dict[str, Any]]:
    """Figures of each model, by name, the teacher first; it runs once for all of them.

    Models are placed on `mesh`; batches are host arrays of equal shape.

    Returns:
        `perplexity` per predicted token; in nats per token `kl`, KL(teacher || model), and `kl_reverse`, KL(model ||
        teacher); `agreement`, the share of tokens after which both find the same next token most likely; `tokens`;
        `intervals`, of each figure [low, high], over rows; `positions`, the figures of tokens that have `first` to
        `end` - 1 tokens of their document before them in the row.

    Raises:
        DataError: no batch, or none with a predicted token.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in models}
    edges: list[int] = []
    run = jax.jit(partial(outputs, dtype=dtype))
    measure = jax.jit(_sums, static_argnames=("buckets", "dtype"))
    for batch in batches:
        edges = position_edges(batch["tokens"].shape[1])
        bucket = np.searchsorted(edges[1:-1], _positions(batch["segment_ids"]), "right").astype(np.int32)
        placed = place_batch(batch | {"bucket": bucket}, mesh)
        expected = run(models["teacher"], placed["tokens"], placed["segment_ids"])
        for name, model in models.items():
            own = expected if name == "teacher" else run(model, placed["tokens"], placed["segment_ids"])
            sums = measure(own, expected, placed, buckets=len(edges) - 1, dtype=dtype)
            rows[name].append(np.asarray(jax.device_get(sums), np.float64))
    if not edges or not np.concatenate(rows["teacher"])[..., SUMS.index("predicted")].any():
        raise DataError("The held-out text has no token to predict; give it more text (data.heldout).")
    return {name: _figures(np.concatenate(sums), edges) for name, sums in rows.items()}


def position_edges(length: int) -> list[int]:
    """Where buckets of positions begin and, at last, end: each as long as all before it, the last half a row."""
    edges = [length]
    while edges[0] >= 2 * SHORTEST and len(edges) < MOST:
        edges.insert(0, -(-edges[0] // 2))
    return [0, *edges]


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """[B,T]: how many tokens of its own segment stand before each token."""
    index = np.arange(segment_ids.shape[1])
    begins = np.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)


def _figures(rows: np.ndarray, edges: list[int]) -> dict[str, Any]:
    """Of sums [rows, buckets, SUMS]."""
    of_row = rows.sum(1)
    of_row = of_row[of_row[:, SUMS.index("tokens")] > 0]  # the last batch is filled up with padding
    return {
        **_ratios(of_row.sum(0)),
        "tokens": int(of_row[:, SUMS.index("tokens")].sum()),
        "intervals": _intervals(of_row) if len(of_row) > 1 else {},
        "positions": [
            {"first": first, "end": end, "tokens": int(sums[SUMS.index("tokens")]), **_ratios(sums)}
            for first, end, sums in zip(edges, edges[1:], rows.sum(0))
            if sums[SUMS.index("predicted")] > 0
        ],
    }


def _ratios(sums: np.ndarray) -> dict[str, float]:
    values = dict(zip(SUMS, sums.tolist()))
    ratios = {name: values[top] / values[bottom] for name, (top, bottom) in FIGURES.items()}
    return ratios | {"perplexity": math.exp(ratios["perplexity"])}


def _intervals(of_row: np.ndarray) -> dict[str, list[float]]:
    columns = dict(zip(SUMS, of_row.T))
    found = {name: resampled(columns[top], columns[bottom]) for name, (top, bottom) in FIGURES.items()}
    return {name: [math.exp(x) if name == "perplexity" else x for x in ends] for name, ends in found.items()}


def _sums(own: Hidden, expected: Hidden, batch: Batch, *, buckets: int, dtype: Any) -> jax.Array:
    """[B, buckets, SUMS] of a batch with `bucket` [B,T] beside tokens and segments; the same on all devices."""
    targets, predicted = next_token_targets(batch["tokens"], batch["segment_ids"])
    spec, vocab_size = batch_spec(batch["tokens"]), min(own[1].shape[1], expected[1].shape[1])
    is_split = splits_tokens(spec)

    def local(
        own: Hidden, expected: Hidden, targets: jax.Array, predicted: jax.Array, tokens: jax.Array, bucket: jax.Array
    ) -> jax.Array:
        ours, theirs = (own_columns(head, vocab_size, dtype) for _, head in (own, expected))

        def compare(chunk: tuple[jax.Array, ...]) -> jax.Array:
            hidden, other, target = map(gathered, chunk)
            q, p = ours.logits(hidden, vocab_size), theirs.logits(other, vocab_size)
            log_zq, log_zp = log_partition(q), log_partition(p)
            difference = (p - log_zp[:, None]) - (q - log_zq[:, None])  # log p - log q
            forward, reverse = (
                total(jnp.sum(jnp.exp(z - log_z[:, None]) * sign * difference, -1), "fsdp", "context", "tensor")
                for z, log_z, sign in ((p, log_zp, 1), (q, log_zq, -1))
            )
            same = most_likely(q, ours.numbers) == most_likely(p, theirs.numbers)
            nll = log_zq - chosen(q, ours.numbers, target)
            return own_tokens(jnp.stack([nll, forward, reverse, same.astype(nll.dtype)], -1))

        flat = tuple(x.reshape(-1, *x.shape[2:]) for x in (own[0], expected[0], targets))
        found = jax.lax.map(compare, in_chunks(flat, TOKENS_AT_ONCE)).reshape(-1, 4)[: targets.size]
        nll, forward, reverse, same = jnp.moveaxis(found.reshape(*targets.shape, 4), -1, 0)
        counted = jnp.stack(
            [nll * predicted, predicted, forward * tokens, reverse * tokens, same * tokens, tokens], -1
        )  # [B,T,SUMS], in the order of SUMS
        # By a mask and not a product with one-hot rows: GPUs round the operands of products.
        sums = jnp.stack([jnp.sum(counted * (bucket == k)[..., None], 1) for k in range(buckets)], 1)
        return total(sums, "context") if is_split else sums

    of_head = [head_spec(*head.shape) for _, head in (own, expected)]
    specs = (spec, of_head[0]), (spec, of_head[1]), spec, spec, spec, spec
    arguments = own, expected, targets, predicted, token_mask(batch["segment_ids"]), batch["bucket"]
    result = P(ROWS) if is_split else P(spec[0])
    sums = on_shards(local, arguments, specs, result)
    return sums if active_mesh() is None else jax.reshard(sums, P())
