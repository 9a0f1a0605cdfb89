"""Sequence sharding: the recurrences inside `jax.shard_map`, with the token axis split over a mesh axis.

To the state, shard p is an affine map. With E_p and R_p its last state and its outputs when it starts from zero,
    exit_p = M_p entry_p + E_p      entry_{p+1} = exit_p      out = R_p + reads_p entry_p.
Every shard computes M_p and E_p alone; a prefix over the mesh axis, of logarithmic depth, makes the entry states; then
the shard runs from its own. The backward mirrors it. With X_p the gradient of exit_p,
    X_{p-1} = M_p' X_p + reads_p' d_out,
so that a second prefix makes every X_p, and the shard's own backward runs once, from X_p. Nothing is differentiated
twice, and nothing but maps and states crosses shards: M_p [K,1] or [K,K] and a state [K,V] per head and round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.api import linear_attention
from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.dplr.api import dplr_attention
from jaxhybrid_kernels.dplr.inputs import Inputs as DplrInputs
from jaxhybrid_kernels.dplr.inputs import check_inputs
from jaxhybrid_kernels.mesh_axis import affine_prefix, axis_size, on_last_shard, opens_segment
from jaxhybrid_kernels.norms import normalize_tokens
from jaxhybrid_kernels.numerics import compute_dtype, product, state_dtype, varying_alike
from jaxhybrid_kernels.segments import segment_index, zero_padding
from jaxhybrid_kernels.validation import check_norm_eps, check_sequence


def context_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    norm_eps: float | None = None,
    *,
    axis_name: str,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` inside `jax.shard_map`, on this shard's T tokens of a sequence split over `axis_name`.

    Arrays over tokens hold the shard's own; shards follow one another in the order of the mesh axis. initial_state is
    that before the whole sequence and the returned state that after it, both the same on all shards of the axis
    (PartitionSpec without `axis_name`). Documents may cross shards, and shards may be padding throughout. All else,
    with gradients and errors, as for `linear_attention`; ValueError also if `axis_name` is no axis of a shard_map here.
    """
    check_norm_eps(norm_eps)
    check_sequence(q, k, v, log_decay, beta, segment_ids, initial_state)
    if norm_eps is not None:  # once for all runs of a shard
        q, k = (normalize_tokens(x, segment_ids, norm_eps) for x in (q, k))
    operator = Operator(linear_attention, scale, chunk_size, implementation)
    return _over_shards(operator, Inputs(q, k, v, log_decay, beta, segment_ids), initial_state, axis_name)


def context_dplr_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    a: jax.Array,
    b: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    *,
    axis_name: str,
) -> tuple[jax.Array, jax.Array]:
    """`dplr_attention` on one shard of a sequence split over `axis_name`, as in `context_linear_attention`."""
    inputs = DplrInputs(q, k, v, log_decay, a, b, segment_ids)
    check_inputs(inputs, "batch, tokens, heads, width", "initial_state", initial_state)
    return _over_shards(Operator(dplr_attention, scale, chunk_size, implementation), inputs, initial_state, axis_name)


class Operator(NamedTuple):
    """A recurrence with its static arguments; it takes (*inputs, initial state, *these)."""

    function: Callable[..., tuple[jax.Array, jax.Array]]
    scale: float | None
    chunk_size: int | None
    implementation: str | None

    def run(self, inputs: Any, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return self.function(*inputs, state, *self[1:])


class Summary(NamedTuple):
    """A shard as an affine map of its entry state; see above."""

    written: jax.Array  # E [B,N,K,V], state dtype
    transition: jax.Array  # M [B,N,K,K], or the diagonal [B,N or 1,K or 1,1] of the additive rule
    reads: jax.Array  # [B,T,H,K], v's dtype


def _over_shards(
    operator: Operator, inputs: Any, initial_state: jax.Array | None, axis_name: str
) -> tuple[jax.Array, jax.Array]:
    if axis_size(axis_name) == 1:
        out, final = operator.run(inputs, initial_state)
    else:
        dtype = state_dtype(*inputs._replace(segment_ids=None), initial_state)
        (B, _, N, V), K = inputs.v.shape, inputs.k.shape[-1]
        state = jnp.zeros((B, N, K, V), dtype) if initial_state is None else initial_state.astype(dtype)
        out, final = _sharded(operator, axis_name, *varying_alike(inputs, state))
    return out, lax.psum(final, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(operator: Operator, axis_name: str, inputs: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out, the final state on the last shard and zeros on the others)."""
    return _sharded_fwd(operator, axis_name, inputs, state)[0]


def _sharded_fwd(operator: Operator, axis_name: str, inputs: Any, state: jax.Array) -> tuple[Any, Any]:
    summary = _summarize(operator, inputs, state.dtype)
    continues = None
    if inputs.segment_ids is not None:
        continues = ~opens_segment(inputs.segment_ids, axis_name)[:, None, None, None]
        summary = summary._replace(transition=jnp.where(continues, summary.transition, 0))
    entry, _ = affine_prefix(summary.written, summary.transition, state, axis_name)
    entry = entry if continues is None else jnp.where(continues, entry, 0)
    segment_ids, arrays = inputs.segment_ids, inputs._replace(segment_ids=None)

    def run(arrays: Any, entry: jax.Array) -> tuple[jax.Array, jax.Array]:
        return operator.run(arrays._replace(segment_ids=segment_ids), entry)

    (out, final), pull = jax.vjp(run, arrays, entry)
    return (out, on_last_shard(final, axis_name)), (summary, continues, segment_ids, pull)


def _sharded_bwd(operator: Operator, axis_name: str, kept: Any, gradients: Any) -> tuple[Any, jax.Array]:
    (summary, continues, segment_ids, pull), (d_out, d_final) = kept, gradients
    d_entry = _read_gradient(summary, zero_padding(d_out, segment_ids))
    if continues is not None:
        d_entry = jnp.where(continues, d_entry, 0)
    diagonal = summary.transition.shape[-1] == 1
    transition = summary.transition if diagonal else jnp.swapaxes(summary.transition, -1, -2)
    d_exit, d_before = affine_prefix(d_entry, transition, d_final, axis_name, reverse=True)
    d_arrays, _ = pull((d_out, d_exit))
    return d_arrays, jnp.where(lax.axis_index(axis_name) == 0, d_before, 0)


_sharded.defvjp(_sharded_fwd, _sharded_bwd)


def _summarize(operator: Operator, inputs: Any, dtype: Any) -> Summary:
    if isinstance(inputs, Inputs) and inputs.beta is None:
        return _additive_summary(operator, inputs, dtype)
    # Linear in (v, state) together: values of zero and the identity as the state make the transition.
    (B, T, N, V), K = inputs.v.shape, inputs.k.shape[-1]
    nothing = jnp.zeros((B, T, N, K), inputs.v.dtype)
    _, written = operator.run(inputs, jnp.zeros((B, N, K, V), dtype))
    reads, transition = operator.run(
        inputs._replace(v=nothing), jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, N, K, K))
    )
    return Summary(written, transition, reads)


def _additive_summary(operator: Operator, inputs: Inputs, dtype: Any) -> Summary:
    """E = sum_t diag(exp(G_T - G_t)) k_t v_t',  M = exp(G_T),  reads_t = scale exp(G_t) q_t; G sums log_decay.

    One product over all tokens of the shard. Sums run from either end, so that no exponent is a difference.
    """
    B, T, N, _ = inputs.v.shape
    heads = max(inputs.q.shape[2], N)
    compute = compute_dtype(*inputs[:3])
    q, k, v = (zero_padding(x, inputs.segment_ids) for x in inputs[:3])
    k = jnp.repeat(k, N // k.shape[2], axis=2).astype(dtype)
    q = jnp.repeat(q, heads // q.shape[2], axis=2).reshape(B, T, N, heads // N, -1).astype(dtype)
    log_decay = jnp.zeros((1, T, 1, 1), dtype)
    if inputs.log_decay is not None:
        log_decay = zero_padding(inputs.log_decay, inputs.segment_ids).astype(dtype).reshape(B, T, N, -1)
    since = lax.cumsum(log_decay, axis=1)
    until = jnp.concatenate([lax.cumsum(log_decay, axis=1, reverse=True)[:, 1:], jnp.zeros_like(since[:, :1])], axis=1)
    whole = since[:, -1]
    if inputs.segment_ids is not None:
        index = segment_index(inputs.segment_ids)[..., None, None]
        since = jnp.where(index == 0, since, -jnp.inf)
        until = jnp.where(index == index[:, -1:], until, -jnp.inf)
        whole = jnp.where(index[:, -1] == 0, whole, -jnp.inf)
    scale = q.shape[-1] ** -0.5 if operator.scale is None else operator.scale
    written = product("btnk,btnv->bnkv", (k * jnp.exp(until)).astype(compute), v.astype(compute))
    reads = scale * jnp.exp(since)[:, :, :, None] * q
    return Summary(written, jnp.exp(whole)[..., None], reads.reshape(B, T, heads, -1).astype(v.dtype))


def _read_gradient(summary: Summary, d_out: jax.Array) -> jax.Array:
    """reads' d_out, summed over tokens and over the queries of a state: [B,N,K,V]."""
    B, T, _, V = d_out.shape
    N = summary.written.shape[1]
    reads = summary.reads.reshape(B, T, N, -1, summary.reads.shape[-1])
    return product("btnrk,btnrv->bnkv", reads, d_out.reshape(B, T, N, -1, V)).astype(summary.written.dtype)
