"""Operands of a chunk for one decay per head or none, and their gradients, inside a kernel.

D_ij = exp(G_i - G_j) where i >= j share a segment, else 0; the difference is masked before the exponential.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.tpu.gates import HeadGates
from jaxhybrid_kernels.tpu.operands import Operands, StateGradients
from jaxhybrid_kernels.tpu.products import product, product_transposed, transposed_product
from jaxhybrid_kernels.tpu.turns import Chain


def head_operands(q: jax.Array, k: jax.Array, gates: HeadGates, columns: jax.Array | None = None) -> Chain[Operands]:
    """From q [R*C,K] and k [C,K]; columns [1,C] multiply those of pair and coupling."""
    C = k.shape[0]
    gram = product_transposed(jnp.concatenate([k, q], axis=0) if gates.beta is not None else q, k)
    yield
    decay = _decay(gates, C)
    if columns is not None:
        decay = decay * columns
    coupling = None
    if gates.beta is not None:
        coupling, gram = gram[:C] * decay, gram[C:]
    pair = gram * _repeat(decay, q.shape[0] // C)
    carry = None if gates.entry is None else gates.entry[C - 1 :]
    return Operands(q, k, k, gates.entry, gates.exit, gates.exit_row, carry, pair, coupling)


def head_gradients(
    q: jax.Array, k: jax.Array, gates: HeadGates, gradients: StateGradients, scale: float
) -> Chain[tuple[jax.Array, jax.Array, jax.Array | None]]:
    """Gradients of q [R*C,K], k [C,K] and of G [C,1] (None without decay); that of G_C is in the last row.

    D_ij scales the score of i and j, so that G_i gets the sum of q_i dq_i and loses that of k_i dk_i, each over what
    passed through D. Both use the same rounded matrices of score gradients, so that they cancel where they must.
    """
    C, queries = k.shape[0], q.shape[0] // k.shape[0]
    decay = _decay(gates, C)
    d_scores = (gradients.pair * _repeat(scale * decay, queries)).astype(k.dtype)
    from_keys = d_scores
    d_late = None
    if gradients.coupling is not None and gradients.k_in is not None:
        d_gram = (gradients.coupling * decay).astype(k.dtype)
        from_keys = jnp.concatenate([d_scores, d_gram], axis=0)
    products = product(from_keys, k)
    yield
    d_q = gradients.q_in + products[: q.shape[0]]
    d_early = gradients.k_out + transposed_product(d_scores, q)
    if gradients.coupling is not None and gradients.k_in is not None:
        d_late = gradients.k_in + products[q.shape[0] :]
        d_early = d_early + transposed_product(d_gram, k)
    yield
    d_k = d_early if d_late is None else d_early + d_late
    if gates.sum is None or gradients.carry is None:
        return d_q, d_k, None
    keys = k.astype(jnp.float32)
    weighted = keys * (-d_early if d_late is None else d_late - d_early)
    by_query = q.astype(jnp.float32) * d_q
    for r in range(queries):
        weighted = weighted + by_query[r * C : (r + 1) * C]
    leaving = jnp.sum(keys * gradients.k_out, axis=0, keepdims=True)
    d_last = jnp.sum(leaving, axis=1, keepdims=True) + jnp.sum(gradients.carry, axis=1, keepdims=True)
    last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
    return d_q, d_k, jnp.sum(weighted, axis=1, keepdims=True) + jnp.where(last, d_last, 0)


def _decay(gates: HeadGates, C: int) -> jax.Array:
    """D [C,C]."""
    row, column = _positions(C)
    mask = row >= column
    if gates.end_row is not None:
        mask = mask & (row.astype(jnp.float32) < gates.end_row)
    if gates.sum is None or gates.sum_row is None:
        return mask.astype(jnp.float32)
    difference = gates.sum - gates.sum_row
    if gates.sum_low is not None and gates.sum_low_row is not None:
        difference = difference + (gates.sum_low - gates.sum_low_row)
    return jnp.exp2(jnp.where(mask, difference, -jnp.inf))


def _positions(C: int) -> tuple[jax.Array, jax.Array]:
    return lax.broadcasted_iota(jnp.int32, (C, C), 0), lax.broadcasted_iota(jnp.int32, (C, C), 1)


def _repeat(x: jax.Array, times: int) -> jax.Array:
    return x if times == 1 else jnp.concatenate([x] * times, axis=0)
