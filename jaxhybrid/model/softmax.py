"""softmax(q k' / sqrt(K)) v over earlier tokens of the same document, in memory linear in the row.

Only rows that are short make an array of tokens by tokens. On TPUs JAX's splash attention runs, on NVIDIA GPUs cuDNN
or, on Hopper, kernels of our own, elsewhere and for 32 bits plain JAX. docs/attention.md has the figures,
and what was tried besides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec as P
from jaxhybrid_kernels.gpu.decode_attention import decode_attention_kernel, decode_attention_refusal
from jaxhybrid_kernels.gpu.softmax_attention import KEPT, make_plan, softmax_attention, softmax_attention_refusal
from jaxhybrid_kernels.numerics import attends_by_kernels, decodes_by_kernels, on_nvidia, target_platform

from jaxhybrid.model.layers import capped, exact_dtype, segment_starts
from jaxhybrid.model.partition import varying_alike, varying_along

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that a row with every key masked stays finite
QUERY_BLOCK = 1024  # queries of a block of the plain form, at most
CAPPED_SCORES = 2**26  # of a block on GPUs, where the plain form is that of capped scores: 256 MiB of float32
GPU_ROW = 2048  # keys up to which cuDNN gets one mask for all queries, and its gradient computes nothing again
GPU_QUERY_BLOCK = 512
GPU_QUERIES = 4096  # that one call of cuDNN should have at least, to fill the chip
GPU_MANY_QUERIES = 32768  # in rows up to GPU_MIDDLE_ROW: most batches in one call, with no loop and one choice
GPU_MIDDLE_ROW = 8192
TPU_BLOCK = 512  # queries, and keys, of a block of splash attention
TPU_LONG_BLOCK, TPU_LONG = 1024, 32768  # in longer rows: a table of all pairs of blocks is in scalar memory
DECODE_BLOCK = 512  # keys of a block of the cache
LANES = 128
CUDNN: Literal["cudnn", "xla"] = "cudnn"

PLACE_BITS = 30  # of a query's number as splash attention's mask gets it; the next one: its layer slides

# (q [N,Q,H,K], k and v [N,W,G,K], visible [N,Q,W]) -> [N,Q,H,K]
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Window(NamedTuple):
    """Of a sliding window: a query sees `size` keys at most, its own among them, where the layer `slides`.

    Besides them it sees the first `sinks` keys of its document (arXiv 2309.17453).
    """

    size: int
    slides: Any  # bool, may be traced
    sinks: int = 0

    def starts(self, starts: jax.Array, first: jax.Array) -> jax.Array:
        """The first key that queries at first, first+1, ... see, if without the window it is starts [B,Q]."""
        query = first + jnp.arange(starts.shape[1], dtype=jnp.int32)
        return jnp.where(self.slides, jnp.maximum(starts, query - (self.size - 1)), starts)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    key_segment_ids: jax.Array | None = None,
    first_query: jax.Array | None = None,
    window: Window | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v over the keys of a query's document up to its own: [B,Q,H,K] in q's dtype.

    For arrays of one device: call it without a mesh, or inside `jax.shard_map`.

    Args:
        q, k, v: [B,Q,H,K] and [B,M,G,K], G divides H.
        segment_ids: [B,Q] or None: all one document. A document is one run of equal ids; so is padding.
        key_segment_ids: [B,M], where keys are not those of the queries.
        first_query: traced int32: the place of the first query on the keys' axis, at most M - Q. None: 0, and M is Q.
        window: of those keys the last few only, and the first few if it has sinks.
        cap: scores s = q k' / sqrt(K) become cap * tanh(s / cap). cuDNN has no such thing: GPUs take the plain form.
    """
    if key_segment_ids is None:
        assert first_query is None or segment_ids is None, "queries that are a slice need the ids of all keys"
        key_segment_ids = segment_ids
    platform = target_platform()
    by_cudnn = platform == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and cap is None
    if by_cudnn and key_segment_ids is None and first_query is None and window is None:
        return _cudnn_causal(q, k, v)
    B, Q = q.shape[:2]
    starts, documents, first = document_starts(key_segment_ids, k, Q, first_query)
    q, k, v, starts, documents, first = varying_alike(q, k, v, starts, documents, first)
    sinks = 0 if window is None else window.sinks
    if platform == "tpu" and q.dtype == jnp.bfloat16 and q.shape[-1] % 64 == 0 and not sinks:
        return splash_attention(q, k, v, documents, starts, first, window, cap)
    seen = Seen(documents if window is None else window.starts(documents, first), documents, sinks)
    if by_cudnn and not sinks and attends_by_kernels() and softmax_attention_refusal(q, k) is None:
        return softmax_attention(q, k, v, seen.starts, first, make_plan(q, k))
    if by_cudnn and k.shape[1] <= GPU_ROW:
        return _cudnn_short(q, k, v, seen, first, is_causal=first_query is None)
    if by_cudnn:
        size = min(GPU_QUERY_BLOCK, Q + -Q % 8)
        most = GPU_MANY_QUERIES if k.shape[1] <= GPU_MIDDLE_ROW else GPU_QUERIES
        blocks = size, max(1, min(most // (B * size), math.ceil(Q / size)))
        if first_query is None:
            return _cudnn_documents(q, k, v, seen, first, blocks)
        return _cudnn_windowed(q, k, v, seen, first, blocks)
    attend, size = partial(_plain_masked, cap=cap), QUERY_BLOCK
    if platform == "gpu" and cap is not None:
        size = _capped_block(B * q.shape[2] * k.shape[1])
    if size >= Q:
        return attend(q, k, v, seen.visible(first, k.shape[1]))
    return windowed_attention(q, k, v, seen, first, attend=attend, size=size, at_once=1)


def document_starts(
    key_segment_ids: jax.Array | None, k: jax.Array, queries: int, first_query: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the documents of keys [B,M] and of so many queries [B,Q] start, and the first query's place among the keys;
    arguments as `causal_attention` has them."""
    starts = segment_starts(key_segment_ids) if key_segment_ids is not None else jnp.zeros(k.shape[:2], jnp.int32)
    if first_query is None:
        return starts, starts, jnp.int32(0)
    return starts, jax.lax.dynamic_slice_in_dim(starts, first_query, queries, 1), first_query


def _capped_block(scores: int) -> int:
    """Queries of a block on GPUs, each of which has so many scores in all rows and heads: a power of two, but not so
    few that a matrix product is narrow."""
    most = max(CAPPED_SCORES // scores, 1)
    return min(QUERY_BLOCK, max(64, 1 << most.bit_length() - 1))


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    last: jax.Array,
    window: Window | None = None,
    cap: float | None = None,
) -> jax.Array:
    """One query a row, q [B,H,K], to the keys up to `last` [B] of the caches k, v [B,G,M,K]: [B,H,K]."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    by_kernel = window is None and cap is None and decodes_by_kernels() and on_nvidia()
    if by_kernel and decode_attention_refusal(grouped, k) is None:
        return decode_attention_kernel(grouped, k, v, last).reshape(q.shape).astype(q.dtype)
    return plain_decode_attention(q, k, v, last, window, cap)


def plain_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    last: jax.Array,
    window: Window | None = None,
    cap: float | None = None,
) -> jax.Array:
    """`decode_attention` by XLA.

    The sum over values is made in blocks of the cache and the blocks are added up: with one row and few heads, one
    product for each head would leave most of a GPU idle.
    """
    (B, H, K), (G, M) = q.shape, k.shape[1:3]
    exact, block = exact_dtype(q.dtype), math.gcd(M, DECODE_BLOCK)
    scores = jnp.einsum("bgrk,bgmk->bgrm", q.reshape(B, G, H // G, K), k, preferred_element_type=exact)
    seen = jnp.arange(M, dtype=jnp.int32) <= last[:, None]
    if window is not None:
        seen &= jnp.arange(M, dtype=jnp.int32) >= window.starts(jnp.zeros_like(last)[:, None], last[:, None])
    scores = jnp.where(seen[:, None, None], capped(scores * K**-0.5, cap), MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    sums = jnp.einsum(
        "bgrnm,bgnmk->bgnrk", weights.astype(v.dtype).reshape(B, G, H // G, -1, block), v.reshape(B, G, -1, block, K),
        preferred_element_type=exact,
    )  # fmt: skip
    out = jnp.sum(sums, axis=2) / jnp.sum(weights, axis=-1, keepdims=True)
    return out.reshape(B, H, K).astype(q.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=("starts", "documents"), meta_fields=("sinks",))
@dataclass(frozen=True)
class Seen:
    """What each of some queries sees: the keys from `starts` to its own, and the first `sinks` of its document."""

    starts: jax.Array  # [B,Q]
    documents: jax.Array  # [B,Q]: where its document starts
    sinks: int = 0

    def visible(self, first: jax.Array, keys: int) -> jax.Array:
        """[B,Q,keys] for queries at first, first+1, ..."""
        query = first + jnp.arange(self.starts.shape[1], dtype=jnp.int32)
        return self.by_query(lambda x: x[..., None]).sees(query[:, None], jnp.arange(keys, dtype=jnp.int32))

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Of queries and keys at these places, all of shapes that go together."""
        seen = key >= self.starts
        if self.sinks:
            seen |= (key >= self.documents) & (key < self.documents + self.sinks)
        return seen & (key <= query)

    def by_query(self, change: Callable[[jax.Array], jax.Array]) -> "Seen":
        return Seen(change(self.starts), change(self.documents), self.sinks)


# --- Plain JAX, and cuDNN ---------------------------------------------------------------------------------------------


def _plain_masked(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, cap: float | None = None) -> jax.Array:
    """q [N,Q,H,K], k and v [N,M,G,K], visible [N or 1,Q,M]; scores and softmax in float32."""
    N, Q, H, K = q.shape
    G = k.shape[2]
    scores = jnp.einsum(
        "bqgrk,bmgk->bgrqm", q.reshape(N, Q, G, H // G, K), k, preferred_element_type=exact_dtype(q.dtype)
    )
    scores = jnp.where(visible[:, None, None], capped(scores * K**-0.5, cap), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrqm,bmgk->bqgrk", weights, v).reshape(N, Q, H, K)


def _cudnn_masked(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation=CUDNN)


def _cudnn_short(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, first: jax.Array, is_causal: bool) -> jax.Array:
    Q, M = q.shape[1], k.shape[1]
    q, (k, v) = _pad_tokens(q, 0, Q % 2), (_pad_tokens(x, 0, M % 2) for x in (k, v))  # cuDNN refuses odd lengths
    visible = seen.by_query(lambda x: jnp.pad(x, ((0, 0), (0, Q % 2)))).visible(first, M + M % 2)
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], is_causal=is_causal, implementation=CUDNN)[
        :, :Q
    ]


def _cudnn_causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    T = q.shape[1]
    if T % 2:  # nothing looks at a token after the last
        q, k, v = (_pad_tokens(x, 0, 1) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=CUDNN)[:, :T]


def _cudnn_windowed(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, first: jax.Array, blocks: tuple[int, int]
) -> jax.Array:
    size, at_once = blocks
    return windowed_attention(q, k, v, seen, first, attend=_cudnn_masked, size=size, at_once=at_once)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cudnn_documents(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, first: jax.Array, blocks: tuple[int, int]
) -> jax.Array:
    """Without a mask where every row is one document. The gradient computes the attention once more."""
    return jax.lax.cond(jnp.all(seen.starts == 0), *_cudnn_branches(seen, first, blocks), q, k, v)


def _cudnn_branches(
    seen: Seen, first: jax.Array, blocks: tuple[int, int]
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    return _cudnn_causal, lambda q, k, v: _cudnn_windowed(q, k, v, seen, first, blocks)


def _cudnn_documents_forward(q: Any, k: Any, v: Any, seen: Seen, first: Any, blocks: tuple[int, int]) -> Any:
    return _cudnn_documents(q, k, v, seen, first, blocks), (q, k, v, seen, first)


def _cudnn_documents_backward(blocks: tuple[int, int], saved: Any, d_out: jax.Array) -> Any:
    *operands, seen, first = saved
    pulls = [lambda *x, run=run: jax.vjp(run, *x)[1](d_out) for run in _cudnn_branches(seen, first, blocks)]
    return *jax.lax.cond(jnp.all(seen.starts == 0), *pulls, *operands), None, None


_cudnn_documents.defvjp(_cudnn_documents_forward, _cudnn_documents_backward)


def _pad_tokens(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)))


# --- Blocks of queries against a window of the keys -------------------------------------------------------------------


class _Window(NamedTuple):
    """What a step hands to attention: `blocks` blocks of `queries`, each with `keys` keys up to its last query's."""

    blocks: int
    queries: int
    keys: int
    moves: bool = True  # False: the same keys for every step

    def first_key(self, at: jax.Array) -> jax.Array:
        """Of the first block of the step whose first query is at `at`."""
        return at + self.queries - self.keys if self.moves else jnp.zeros_like(at)

    @property
    def span(self) -> int:
        """The keys of all its blocks, which overlap."""
        return (self.blocks - 1) * self.queries + self.keys


class _Plan(NamedTuple):
    attend: Attend
    windows: tuple[_Window, ...]  # narrow to wide; the last holds all keys
    before: int  # keys of padding before the first
    sinks: int  # that blocks have at hand beside their windows: a multiple of 8, as cuDNN wants it

    @property
    def step(self) -> int:
        return self.windows[0].blocks * self.windows[0].queries


def windowed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, first: jax.Array, *, attend: Attend, size: int, at_once: int
) -> jax.Array:
    """Of q [B,Q,H,K], at first, first+1, ... of the keys [B,M,G,K], each to those that it sees.

    A step takes `at_once` blocks of `size` queries, and of windows with 2, 4, 8, ... times as many keys, or all keys,
    the least that holds what they see, sinks aside: those of the document that a block begins in are put beside its
    window, and of a document that begins inside a block they are in it. The gradient computes a step's attention once
    more.
    """
    Q, M, step = q.shape[1], k.shape[1], size * at_once
    padding = -Q % step
    after = padding + -(M + padding) % 8
    windows = [_Window(at_once, size, 2 * size)]
    while windows[-1].keys <= M // 2:
        windows.append(windows[-1]._replace(keys=2 * windows[-1].keys))
    windows[-1] = _Window(1, step, M + after, moves=False)
    before = max((window.keys for window in windows[:-1]), default=0)
    k, v = (_pad_tokens(x, before, after) for x in (k, v))
    own = jnp.broadcast_to(first + jnp.arange(Q, Q + padding, dtype=jnp.int32), (q.shape[0], padding))
    seen = seen.by_query(lambda x: jnp.concatenate([x, own], axis=1))  # queries of the padding see themselves
    plan = _Plan(attend, tuple(windows), before, seen.sinks + -seen.sinks % 8)
    return _windowed(_pad_tokens(q, 0, padding), k, v, seen, first, plan)[:, :Q]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _windowed(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, first: jax.Array, plan: _Plan) -> jax.Array:
    def step(args: Any) -> jax.Array:
        at, q, seen = args

        def branch(window: _Window) -> Callable[..., jax.Array]:
            place = partial(_own_keys, seen=seen, at=at, plan=plan, window=window)
            return lambda q, k, v: _step(q, place(k), place(v), seen, at, plan=plan, window=window)

        return jax.lax.switch(_which(plan, seen.starts, at), [branch(w) for w in plan.windows], q, k, v)

    return _joined(jax.lax.map(step, (_places(q, first, plan), _split(q, plan), _split_seen(seen, plan))))


def _windowed_forward(q: Any, k: Any, v: Any, seen: Seen, first: Any, plan: _Plan) -> Any:
    return _windowed(q, k, v, seen, first, plan), (q, k, v, seen, first)


def _windowed_backward(plan: _Plan, saved: Any, d_out: jax.Array) -> Any:
    q, k, v, seen, first = saved

    def step(sums: Any, args: Any) -> Any:
        at, q, seen, d_out = args

        def pull(window: _Window, sums: Any, q: jax.Array, d_out: jax.Array) -> Any:
            own = partial(_own_keys, seen=seen, at=at, plan=plan, window=window)
            run = partial(_step, seen=seen, at=at, plan=plan, window=window)
            d_q, *d_keys = jax.vjp(run, q, own(k), own(v))[1](d_out)
            return [_added(total, d, seen, at, plan, window) for total, d in zip(sums, d_keys)], d_q

        pulls = [partial(pull, window) for window in plan.windows]
        return jax.lax.switch(_which(plan, seen.starts, at), pulls, sums, q, d_out)

    sums = [jnp.zeros_like(x, dtype=exact_dtype(x.dtype)) for x in (k, v)]
    scanned = _places(q, first, plan), _split(q, plan), _split_seen(seen, plan), _split(d_out, plan)
    (d_k, d_v), d_q = jax.lax.scan(step, sums, scanned)
    return _joined(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_windowed.defvjp(_windowed_forward, _windowed_backward)


class _Keys(NamedTuple):
    """Of a step: `span`, the keys of all its windows, and each block's sinks [B,blocks,sinks,...], if it has some."""

    span: jax.Array
    sinks: jax.Array | None


def _own_keys(x: jax.Array, seen: Seen, at: jax.Array, plan: _Plan, window: _Window) -> _Keys:
    span = jax.lax.dynamic_slice_in_dim(x, plan.before + window.first_key(at), window.span, 1)
    places = _sink_places(seen, plan, window)
    if places is None:
        return _Keys(span, None)
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None, None]
    return _Keys(span, x.at[rows, plan.before + places].get(mode="clip"))


def _added(total: jax.Array, d: _Keys, seen: Seen, at: jax.Array, plan: _Plan, window: _Window) -> jax.Array:
    """`total` with the gradients of a step's keys at their places."""
    place = plan.before + window.first_key(at)
    span = jax.lax.dynamic_slice_in_dim(total, place, window.span, 1) + d.span.astype(total.dtype)
    total = jax.lax.dynamic_update_slice_in_dim(total, span, place, 1)
    places = _sink_places(seen, plan, window)
    if places is None or d.sinks is None:
        return total
    rows = jnp.arange(total.shape[0], dtype=jnp.int32)[:, None, None]
    return total.at[rows, plan.before + places].add(d.sinks.astype(total.dtype), mode="drop")


def _sink_places(seen: Seen, plan: _Plan, window: _Window) -> jax.Array | None:
    """[B,blocks,sinks]: the first tokens of the document that each block's first query is in."""
    if not plan.sinks or not window.moves:
        return None
    return seen.documents[:, :: window.queries, None] + jnp.arange(plan.sinks, dtype=jnp.int32)


def _step(q: jax.Array, k: _Keys, v: _Keys, seen: Seen, at: jax.Array, *, plan: _Plan, window: _Window) -> jax.Array:
    """Of the queries at at, at+1, ... to their windows' keys and sinks: [B,step,H,K]."""
    B = q.shape[0]
    blocks, queries, keys, _ = window

    def per_block(x: jax.Array) -> jax.Array:
        return x.reshape(B * blocks, queries, *x.shape[2:])

    def at_hand(x: _Keys) -> jax.Array:
        parts = [jax.lax.slice_in_dim(x.span, b * queries, b * queries + keys, axis=1) for b in range(blocks)]
        windows = jnp.stack(parts, axis=1)
        if x.sinks is not None:
            windows = jnp.concatenate([x.sinks, windows], axis=2)
        return windows.reshape(B * blocks, -1, *x.span.shape[2:])

    shift = queries * jnp.arange(blocks, dtype=jnp.int32)[:, None, None]
    query = at + shift + jnp.arange(queries, dtype=jnp.int32)[:, None]
    first = window.first_key(at) + shift
    own = seen.by_query(lambda x: x.reshape(B, blocks, queries, 1))
    visible = own.sees(query, first + jnp.arange(keys, dtype=jnp.int32))
    places = _sink_places(seen, plan, window)
    if places is not None:  # what is in the window is seen there
        places = places[:, :, None]
        sunk = (places < first) & (places < own.documents + seen.sinks) & (own.documents == own.documents[:, :, :1])
        visible = jnp.concatenate([sunk, visible], axis=-1)
    out = plan.attend(per_block(q), at_hand(k), at_hand(v), visible.reshape(B * blocks, queries, -1))
    return out.reshape(q.shape)


def _which(plan: _Plan, starts: jax.Array, at: jax.Array) -> jax.Array:
    """The first window that holds all that the step's queries see."""
    window = plan.windows[0]
    ends = at + window.queries * jnp.arange(1, window.blocks + 1, dtype=jnp.int32)
    needed = jnp.max(ends - starts[:, :: window.queries])
    return jnp.sum(needed > jnp.array([w.keys for w in plan.windows[:-1]], jnp.int32), dtype=jnp.int32)


def _places(q: jax.Array, first: jax.Array, plan: _Plan) -> jax.Array:
    return first + jnp.arange(0, q.shape[1], plan.step, dtype=jnp.int32)


def _split(x: jax.Array, plan: _Plan) -> jax.Array:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, plan.step, *x.shape[2:]), 1, 0)


def _split_seen(seen: Seen, plan: _Plan) -> Seen:
    return seen.by_query(lambda x: _split(x, plan))


def _joined(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


# --- Splash attention -------------------------------------------------------------------------------------------------


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_starts: jax.Array,
    key_starts: jax.Array,
    first: jax.Array,
    window: Window | None = None,
    cap: float | None = None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Of q [B,Q,H,K], at first, first+1, ... of the keys [B,M,G,K], each to those from query_starts [B,Q] to its own.

    key_starts [B,M] tells the documents of the keys. Pairs of blocks of which no query sees a key are skipped: those
    in the future, those of other documents, and those before the window. `interpret` is for CPUs.
    """
    Q, M = q.shape[1], k.shape[1]
    block = block or (TPU_BLOCK if M <= TPU_LONG else TPU_LONG_BLOCK)
    block_q, block_k = (min(block, length + -length % LANES) for length in (Q, M))
    after_q, after_k = -Q % block_q, -M % block_k
    # Tokens of the padding are of no document.
    segments = splash.SegmentIds(
        jnp.pad(query_starts, ((0, 0), (0, after_q)), constant_values=-1),
        jnp.pad(key_starts, ((0, 0), (0, after_k)), constant_values=-2),
    )
    seen_from = query_starts if window is None else window.starts(query_starts, first)
    pairs = _seeing_blocks(seen_from, first, block_q, block_k, (M + after_k) // block_k)
    places: Any = jnp.broadcast_to(first + jnp.arange(Q + after_q, dtype=jnp.int32), segments.q.shape)
    if window is not None:
        places = places + (jnp.asarray(window.slides, jnp.int32) << PLACE_BITS)
    by_key, by_query = (
        MaskInfo(_nearest(pairs, axis), None, pairs.astype(jnp.int32)[:, None], None, places) for axis in (2, 1)
    )
    operands = varying_alike(
        *(
            jnp.moveaxis(_pad_tokens(x, 0, n), 1, 2)
            for x, n in ((q * q.shape[-1] ** -0.5, after_q), (k, after_k), (v, after_k))
        )
    )
    launch = _Launch(block_q, block_k, interpret, None if window is None else window.size, cap)
    out = _splash(*operands, segments, by_key, by_query, launch)
    return jnp.moveaxis(out, 2, 1)[:, :Q]


def _seeing_blocks(query_starts: jax.Array, first: jax.Array, block_q: int, block_k: int, count: int) -> jax.Array:
    """bool [B,blocks of queries,blocks of keys]: a query of the one sees a key of the other."""
    Q = query_starts.shape[1]
    begins = jnp.arange(0, Q, block_q, dtype=jnp.int32)
    lowest = query_starts[:, ::block_q] // block_k  # starts never fall along a row
    highest = (first + jnp.minimum(begins + block_q, Q) - 1) // block_k
    block = jnp.arange(count, dtype=jnp.int32)
    return (block >= lowest[..., None]) & (block <= highest[:, None])


def _nearest(pairs: jax.Array, axis: int) -> jax.Array:
    """int32 [B,1,..]: the block of `axis` to have at hand at each pair: its own if it is seen, else the nearest seen.

    The seen blocks are neighbours, so that nothing is loaded for a pair that is skipped.
    """
    count = pairs.shape[axis]
    low = jnp.argmax(pairs, axis, keepdims=True)
    high = count - 1 - jnp.argmax(jnp.flip(pairs, axis), axis, keepdims=True)
    own = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, axis)
    return jnp.clip(own, low, high).astype(jnp.int32)[:, None]


def _not_later(query: jax.Array, key: jax.Array) -> jax.Array:
    return query >= key


def _in_window(size: int, query: jax.Array, key: jax.Array) -> jax.Array:
    place = query & ((1 << PLACE_BITS) - 1)
    return (place >= key) & ((query == place) | (key > place - size))


class _Launch(NamedTuple):
    block_q: int
    block_k: int
    interpret: bool
    window: int | None = None
    cap: float | None = None

    @property
    def mask(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return _not_later if self.window is None else partial(_in_window, self.window)

    @property
    def sizes(self) -> splash.BlockSizes:
        q, k = self.block_q, self.block_k
        return splash.BlockSizes(q, k, k, q, k, k, q, k)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _splash(q: Any, k: Any, v: Any, segments: Any, by_key: Any, by_query: Any, launch: _Launch) -> jax.Array:
    return _splash_forward(q, k, v, segments, by_key, by_query, launch)[0]


def _splash_forward(q: Any, k: Any, v: Any, segments: Any, by_key: Any, by_query: Any, launch: _Launch) -> Any:
    def row(args: Any) -> Any:
        q, k, v, segments, table = args
        out, (logsumexp,) = splash._splash_attention_forward(
            table, q, k, v, segments, None, splash.DEFAULT_MASK_VALUE, False, launch.sizes, None, True, launch.mask,
            launch.cap, launch.interpret,
        )  # fmt: skip
        return out, logsumexp

    q, k, v = map(checkpoint_name, (q, k, v), KEPT[:3])
    out, logsumexp = map(checkpoint_name, _row_by_row(row, q, k, v, segments, by_key), KEPT[3:])
    return out, (q, k, v, segments, by_key, by_query, out, logsumexp)


def _splash_backward(launch: _Launch, saved: Any, d_out: jax.Array) -> Any:
    def row(args: Any) -> Any:
        q, k, v, segments, by_key, by_query, out, logsumexp, d_out = args
        saved = q, k, v, segments, None, out, logsumexp, by_key, by_query
        return splash._splash_attention_bwd(
            False,
            splash.DEFAULT_MASK_VALUE,
            False,
            launch.sizes,
            None,
            launch.mask,
            launch.cap,
            launch.interpret,
            saved,
            d_out,
        )[3:6]

    return *_row_by_row(row, *saved, d_out), None, None, None


_splash.defvjp(_splash_forward, _splash_backward)


def _row_by_row(run: Callable[[Any], Any], *batched: Any) -> Any:
    """`run` of one row after the other, where `jax.shard_map` does not check along which axes values vary.

    Splash attention does not say it of its results, so it is said here.
    """
    axes = jax.typeof(batched[0]).manual_axis_type.varying
    if not axes:
        return jax.lax.map(run, batched)
    unchecked = jax.shard_map(lambda *x: jax.lax.map(run, x), in_specs=P(), out_specs=P(), check_vma=False)
    return jax.tree.map(lambda x: varying_along(x, axes), unchecked(*batched))
