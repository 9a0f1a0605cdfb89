"""L2 norms of queries and keys inside the kernels of the delta rule, as factors of what these have anyway.

With r = 1 / sqrt(q'q + eps) and s = 1 / sqrt(k'k + eps) of every token, the rule with queries r q and keys s k is that
with q and k as they are, s^2 beta for beta and v / s for v, its outputs times r: queries and keys are neither scaled
nor rounded. Backward, with d_ for the gradients of that rule at r times the gradient of the outputs,
    dq = d_q - r^2 (q'd_q) q        dk = d_k + s^2 (v'd_v / s - 2 s^2 beta d_beta) k        dv = d_v / s
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.tpu.gates import LANES, HeadGates, scale_rows
from jaxhybrid_kernels.tpu.layout import CHUNK, Layout
from jaxhybrid_kernels.tpu.products import product
from jaxhybrid_kernels.tpu.waiting import set_aside


class Norms(NamedTuple):
    """One head's, with a token's value in every lane, float32; each lies in scratch until it is used (waiting.py)."""

    query_inverse: Any  # r [R*C,LANES]
    key: Any  # 1 / s [C,LANES]
    key_inverse: Any  # s [C,LANES]; None in the forward


def norm_arrays(layout: Layout, backward: bool) -> Norms | None:
    """The scratch of one head, None for a call without norms."""
    if layout.norm_eps is None:
        return None
    query, key = (jax.ShapeDtypeStruct((1, rows, LANES), jnp.float32) for rows in (layout.queries * CHUNK, CHUNK))
    return Norms(query, key, key if backward else None)


def normalize(
    q: jax.Array, k: jax.Array, gates: HeadGates, layout: Layout, waiting: Norms, zero: jax.Array
) -> tuple[HeadGates, Norms]:
    """The gates with s^2 beta for beta, and references to the norms, from q [R*C,K] and k [C,K]."""
    eps = layout.norm_eps
    assert eps is not None
    assert gates.beta is not None
    assert gates.beta_row is not None
    key_square = _square(k) + eps
    inverse = lax.rsqrt(key_square)
    row, column = (lax.broadcasted_iota(jnp.int32, key_square.shape, axis) for axis in (0, 1))
    square_row = jnp.sum(jnp.where(row == column, key_square, 0), axis=0, keepdims=True)
    gates = gates._replace(beta=gates.beta * inverse * inverse, beta_row=gates.beta_row / square_row)
    norms = Norms(lax.rsqrt(_square(q) + eps), key_square * inverse, inverse)
    return gates, Norms(*(None if at is None else set_aside(at, norm, zero) for at, norm in zip(waiting, norms)))


def norm_gradients(
    q: jax.Array, k: jax.Array, norms: Norms, d_q: jax.Array, d_k: jax.Array, d_key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dq [R*C,K] and dk [C,K], float32, from d_q, d_k and d_key [C,1], which is v'd_v / s - 2 s^2 beta d_beta."""
    d_query = jnp.sum(q * d_q, axis=1, keepdims=True)
    query, key = norms.query_inverse[...], norms.key_inverse[...]
    d_q = d_q - scale_rows(q.astype(jnp.float32), query * query * d_query)
    return d_q, d_k + scale_rows(k.astype(jnp.float32), key * key * d_key)


def _square(x: jax.Array) -> jax.Array:
    """x'x of every token of x [C,K], in all lanes: [C,LANES] float32. The matrix units have more room for it than
    what sums over lanes; bfloat16 squares cost 2e-4 of the sum, less than rounding a normalized x would."""
    return product(x * x, jnp.ones((x.shape[1], LANES), x.dtype))
