"""What a chunk contributes apart from the state, as values in a kernel: one head, C tokens, R queries per state.

head_gates.py (one decay per head or none) and channel_gates.py (one per key channel) make Operands and finish
StateGradients; forward.py and backward.py know nothing else of gates.
"""

from typing import NamedTuple

import jax


class Operands(NamedTuple):
    """The chunk's step:  W = v - row_in (k_in S),  U = inverse(I + beta coupling) (beta W),
    S' = carry S + k_out' (row_out U),  O = scale row_in (q_in S) + pair U.  A `None` row or carry is one.

    Rows and a carry per head hold the same value in all of their LANES (see `gates.across`).
    """

    q_in: jax.Array  # [R*C,K] compute dtype
    k_in: jax.Array  # [C,K]
    k_out: jax.Array  # [C,K]
    row_in: jax.Array | None  # [C,LANES] float32
    row_out: jax.Array | None  # [C,LANES]
    carry: jax.Array | None  # [1,LANES] or [K,1]
    pair: jax.Array  # [R*C,C] float32: scaled, masked, decayed
    coupling: jax.Array | None  # [C,C] float32: strictly lower, beta left out; None: additive rule


class StateGradients(NamedTuple):
    """Gradients of these operands that came through entry and exit states, and of pair and coupling; float32."""

    q_in: jax.Array  # [R*C,K]
    k_in: jax.Array | None  # [C,K]
    k_out: jax.Array  # [C,K]
    carry: jax.Array | None  # [1,V], its sum to be taken, or [K,1]; times carry
    pair: jax.Array  # [R*C,C]
    coupling: jax.Array | None  # [C,C]
