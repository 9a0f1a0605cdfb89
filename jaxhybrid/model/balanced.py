"""Causal attention over a row that devices share, with the same work for each of them.

Later queries see more keys: of n devices with neighbouring parts of a row the last has 2n - 1 times the work of the
first. So the row counts as 2n pieces, and device i takes the queries of pieces i and 2n - 1 - i, which see 2n + 1
pieces of keys together, whatever i is (zigzag; the same idea is in Megatron-LM's context parallelism, and for rings
striped attention has it, arXiv 2311.09431). Only queries move, and what becomes of them moves back: keys are at hand
on every device anyway, and all else of a layer keeps its tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhybrid.model.partition import axis_index, axis_size, permuted

AXIS = "context"
# (queries [B,Q,H,K], the place of the first one in the row) -> [B,Q,...]
Attend = Callable[[jax.Array, jax.Array], jax.Array]


def balanced(q: jax.Array, attend: Attend) -> jax.Array:
    """`attend` of this device's queries [B,T,H,K], T even, computed where there is the least to do: [B,T,...]."""
    count, half = axis_size(AXIS), q.shape[1] // 2
    pieces = range(2 * count)
    taker = [min(piece, 2 * count - 1 - piece) for piece in pieces]
    # A device holds an even piece and the odd one behind it, and takes an even and an odd one.
    takers = taker[0::2], taker[1::2]
    device = axis_index(AXIS)
    taken = [jnp.where(device % 2 == parity, device, 2 * count - 1 - device) for parity in (0, 1)]
    sent = (permuted(part, AXIS, to) for part, to in zip(jnp.split(q, 2, axis=1), takers))
    out = jax.lax.map(lambda piece: attend(*piece), (jnp.stack([*sent]), half * jnp.stack(taken)))
    back = (permuted(part, AXIS, _inverse(to)) for part, to in zip(out, takers))
    return jnp.concatenate([*back], axis=1)


def _inverse(to: list[int]) -> list[int]:
    return [to.index(number) for number in range(len(to))]
