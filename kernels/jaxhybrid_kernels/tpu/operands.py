"""What a chunk contributes apart from the state, as values in a kernel: one head, C tokens, R queries per state.

head_gates.py (one decay per head or none) and channel_gates.py (one per key channel) make Operands and finish
StateGradients; forward.py and backward.py know nothing else of gates.
"""

from typing import NamedTuple

import jax


class Operands(NamedTuple):
    """The chunk's step, with D = diag(beta):
        Z = v - row_in (k_in S),  W = inverse(I + coupling D) Z,  U = D W
        S' = carry S + k_out' (row_out U),  O = scale (row_in (q_in S) + pair U)
    A `None` row or carry is one. beta is a factor of columns: [1,C], with tokens in lanes, costs nothing to spread.

    Rows and a carry per head hold the same value in all of their LANES (see `gates.across`).
    """

    q_in: jax.Array  # [R*C,K] compute dtype
    k_in: jax.Array  # [C,K]
    k_out: jax.Array  # [C,K]
    row_in: jax.Array | None  # [C,LANES] float32
    row_out: jax.Array | None  # [C,LANES]
    lanes_out: jax.Array | None  # [1,C]: row_out with tokens in lanes
    carry: jax.Array | None  # [1,LANES] or [K,1]
    pair: jax.Array  # [R*C,C] float32: masked, decayed
    coupling: jax.Array | None  # [C,C] float32: lower, what is on the diagonal does not count; None: additive rule


class StateGradients(NamedTuple):
    """Gradients of these operands that came through entry and exit states, and of pair and coupling; float32."""

    q_in: jax.Array  # [R*C,K]
    k_in: jax.Array | None  # [C,K]
    k_out: jax.Array  # [C,K]
    carry: jax.Array | None  # [1,V], its sum to be taken, or [K,1]; times carry
    pair: jax.Array  # [R*C,C], scale left out
    coupling: jax.Array | None  # [C,C]


def scale_columns(operands: Operands, row: jax.Array | None) -> Operands:
    """Those of pair and coupling times row [1,C]."""
    if row is None:
        return operands
    coupling = None if operands.coupling is None else operands.coupling * row
    return operands._replace(pair=operands.pair * row, coupling=coupling)
