"""One chunk of the recurrence, forward and backward, on 64 rows of the transposed state; see recurrence.py."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxhybrid_kernels.gpu.gates import BETA, CARRY, ROW_IN, ROW_OUT
from jaxhybrid_kernels.gpu.plan import Plan
from jaxhybrid_kernels.gpu.products import accumulate, along_columns, along_rows, columns, multiply, multiply_both, rows


class Chunk(NamedTuple):
    """Shared memory of one chunk; x is v forwards and the gradient of the outputs backwards.

    With decays per channel q, k and k_out have their gates in them, see channel_prepare.py, and gates holds beta alone.
    """

    q: Any  # [64,K]
    k: Any  # not read with decays per channel and without the delta rule
    x: Any  # [64,64]: this warpgroup's columns
    pair: Any  # [64,64]
    inverse: Any  # [64,64]; None for the additive rule
    gates: Any  # [6,64], or [1,64]: beta
    k_out: Any = None  # [64,K]
    carries: Any = None  # [K]

    def gate(self, name: int) -> jax.Array:
        return columns(self.gates.at[name])

    def carry(self, width: int) -> jax.Array:
        return along_rows(rows(self.gates.at[CARRY]), width)

    def values(self) -> jax.Array:
        return plgpu.load(self.x.transpose((1, 0)), layout=plgpu.Layout.WGMMA)


def forward(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, Any]:
    """(S' after the chunk, O' [64,64], U' [64,64] bfloat16)."""
    return (_forward_channels if plan.per_channel else _forward)(plan, chunk, state, entry)


def backward(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """(dS' before the chunk, dV' [64,64], None)."""
    return (_backward_channels if plan.per_channel else _backward)(plan, chunk, d_state, d_exit)


def _forward(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, Any]:
    keys, queries = chunk.k.transpose((1, 0)), chunk.q.transpose((1, 0))

    def written(update: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (update * along_columns(chunk.gate(ROW_OUT))).astype(jnp.bfloat16), update.astype(jnp.bfloat16)

    def innovation(predicted: jax.Array) -> jax.Array:
        beta, values = chunk.gate(BETA), chunk.values().astype(jnp.float32)
        new = values * along_columns(beta) - predicted * along_columns(beta * chunk.gate(ROW_IN))
        return new.astype(jnp.bfloat16)

    if not plan.delta:
        left, update = written(chunk.values().astype(jnp.float32))
        read = multiply(entry, queries, interpret=plan.interpret)
    elif plan.fused:
        # One result less at a time than below.
        new = innovation(multiply(entry, keys, interpret=plan.interpret))
        solve = (new, chunk.inverse.transpose((1, 0)))
        (left, update), read = multiply_both(solve, (entry, queries), written, interpret=plan.interpret)
    else:
        new, read = multiply_both((entry, keys), (entry, queries), innovation, interpret=plan.interpret)
        left, update = written(multiply(new, chunk.inverse.transpose((1, 0)), interpret=plan.interpret))
    state, result = accumulate(
        (state * chunk.carry(plan.K), [(left, chunk.k)]),
        (read * along_columns(chunk.gate(ROW_IN) * plan.scale), [(update, chunk.pair.transpose((1, 0)))]),
        interpret=plan.interpret,
    )
    return state, result, update


def _backward(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    row_in = chunk.gate(ROW_IN)
    from_state = multiply(d_exit, chunk.k.transpose((1, 0)), interpret=plan.interpret)
    d_out = chunk.values()
    (d_value,) = accumulate(
        (from_state * along_columns(chunk.gate(ROW_OUT)), [(d_out, chunk.pair)]), interpret=plan.interpret
    )
    d_read = d_out.astype(jnp.float32) * along_columns(row_in * plan.scale)
    terms = [(d_read.astype(jnp.bfloat16), chunk.q)]
    if plan.delta:
        d_value = multiply(d_value.astype(jnp.bfloat16), chunk.inverse, interpret=plan.interpret)
        d_value = d_value * along_columns(chunk.gate(BETA))
        terms.append(((-d_value * along_columns(row_in)).astype(jnp.bfloat16), chunk.k))
    (d_state,) = accumulate((d_state * chunk.carry(plan.K), terms), interpret=plan.interpret)
    return d_state, d_value, None


def _forward_channels(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, Any]:
    queries = chunk.q.transpose((1, 0))

    def innovation(predicted: jax.Array) -> jax.Array:
        beta = along_columns(columns(chunk.gates.at[0]))
        return ((chunk.values().astype(jnp.float32) - predicted) * beta).astype(jnp.bfloat16)

    if plan.delta:
        new, read = multiply_both(
            (entry, chunk.k.transpose((1, 0))), (entry, queries), innovation, interpret=plan.interpret
        )
        update = multiply(new, chunk.inverse.transpose((1, 0)), interpret=plan.interpret).astype(jnp.bfloat16)
    else:
        update, read = chunk.values(), multiply(entry, queries, interpret=plan.interpret)
    state, result = accumulate(
        (state * along_columns(columns(chunk.carries)), [(update, chunk.k_out)]),
        (read, [(update, chunk.pair.transpose((1, 0)))]),
        interpret=plan.interpret,
    )
    return state, result, update


def _backward_channels(
    plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array
) -> tuple[jax.Array, jax.Array, Any]:
    from_state = multiply(d_exit, chunk.k_out.transpose((1, 0)), interpret=plan.interpret)
    d_out = chunk.values()
    (d_value,) = accumulate((from_state, [(d_out, chunk.pair)]), interpret=plan.interpret)
    terms = [(d_out, chunk.q)]
    if plan.delta:
        d_value = multiply(d_value.astype(jnp.bfloat16), chunk.inverse, interpret=plan.interpret)
        d_value = d_value * along_columns(columns(chunk.gates.at[0]))
        terms.append(((-d_value).astype(jnp.bfloat16), chunk.k))
    carry = along_columns(columns(chunk.carries))
    (d_state,) = accumulate((d_state * carry, terms), interpret=plan.interpret)
    return d_state, d_value, None
