"""One chunk of the recurrence, forward and backward, on 64 rows of the transposed state; see recurrence.py."""

from functools import partial
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

    x: Any  # [64,64]: this warpgroup's columns
    gates: Any  # [6,64], or [1,64]: beta
    q: Any = None  # [64,K]; with pair what the outputs are made from
    pair: Any = None  # [64,64]
    k: Any = None  # [64,K]; None with decays per channel and without the delta rule
    inverse: Any = None  # [64,64]; None for the additive rule
    k_out: Any = None  # [64,K]
    carries: Any = None  # [K]
    valued: Any = None  # false where x counts as zero, if given

    def gate(self, name: int) -> jax.Array:
        return columns(self.gates.at[name])

    def carry(self, width: int) -> jax.Array:
        return along_rows(rows(self.gates.at[CARRY]), width)

    def values(self) -> jax.Array:
        values = plgpu.load(self.x.transpose((1, 0)), layout=plgpu.Layout.WGMMA)
        return values if self.valued is None else jnp.where(self.valued, values, jnp.zeros_like(values))


def forward(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(S' after the chunk, O' [64,64], U' [64,64] bfloat16)."""
    return (_forward_channels if plan.per_channel else _forward)(plan, chunk, state, entry)


def summarize(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, ...]:
    """(S' after the chunk,)."""
    if plan.delta:
        predicted = multiply(entry, chunk.k.transpose((1, 0)), interpret=plan.interpret)
        new = _innovation(plan, chunk, predicted)
        update = multiply(new, chunk.inverse.transpose((1, 0)), interpret=plan.interpret)
    else:
        update = chunk.values().astype(jnp.float32)
    if plan.per_channel:
        carry, written = along_columns(columns(chunk.carries)), (update.astype(jnp.bfloat16), chunk.k_out)
    else:
        carry, written = chunk.carry(plan.K), (_left(chunk, update), chunk.k)
    return accumulate((state * carry, [written]), interpret=plan.interpret)


def backward(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dS' before the chunk, dV' [64,64])."""
    return (_backward_channels if plan.per_channel else _backward)(plan, chunk, d_state, d_exit)


def _innovation(plan: Plan, chunk: Chunk, predicted: jax.Array) -> jax.Array:
    """What the delta rule writes but for the inverse, bfloat16; predicted is S' k'."""
    values = chunk.values().astype(jnp.float32)
    if plan.per_channel:
        new = (values - predicted) * along_columns(columns(chunk.gates.at[0]))
    else:
        beta = chunk.gate(BETA)
        new = values * along_columns(beta) - predicted * along_columns(beta * chunk.gate(ROW_IN))
    return new.astype(jnp.bfloat16)


def _left(chunk: Chunk, update: jax.Array) -> jax.Array:
    """What is left of the updates at the chunk's end, bfloat16."""
    return (update * along_columns(chunk.gate(ROW_OUT))).astype(jnp.bfloat16)


def _forward(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys, queries = chunk.k.transpose((1, 0)), chunk.q.transpose((1, 0))

    def written(update: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _left(chunk, update), update.astype(jnp.bfloat16)

    innovation = partial(_innovation, plan, chunk)
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


def _backward(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    return d_state, d_value


def _forward_channels(plan: Plan, chunk: Chunk, state: jax.Array, entry: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    queries = chunk.q.transpose((1, 0))
    if plan.delta:
        keys, innovation = chunk.k.transpose((1, 0)), partial(_innovation, plan, chunk)
        new, read = multiply_both((entry, keys), (entry, queries), innovation, interpret=plan.interpret)
        update = multiply(new, chunk.inverse.transpose((1, 0)), interpret=plan.interpret).astype(jnp.bfloat16)
    else:
        update, read = chunk.values(), multiply(entry, queries, interpret=plan.interpret)
    state, result = accumulate(
        (state * along_columns(columns(chunk.carries)), [(update, chunk.k_out)]),
        (read, [(update, chunk.pair.transpose((1, 0)))]),
        interpret=plan.interpret,
    )
    return state, result, update


def _backward_channels(plan: Plan, chunk: Chunk, d_state: jax.Array, d_exit: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    return d_state, d_value
