"""The recurrence over a whole sequence: in one run, or where heads are few in spans that run side by side.

A span takes its entry state S' [V,K] to S' M + E. A first run finds E and M of all spans but the last one: M is what
becomes of the identity, in rows of its own that have no values. The entry states follow from span to span, and with
these a second run does all spans. Backwards the gradient of a span's exit state, dS', becomes dS' M' + E. Twice the
work for an S-th of the steps: with enough spans it is faster where a step takes its time whatever else is idle.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxhybrid_kernels.gpu.plan import Plan
from jaxhybrid_kernels.gpu.recurrence import recurrence_kernel


class Result(NamedTuple):
    """What the forward run leaves; see recurrence.py."""

    last: jax.Array  # [B,N,V,K]
    kept: list[jax.Array]  # y and, if asked for, more
    transitions: jax.Array | None  # M [B,N,spans-2,K,K] of all spans but the first and the last one


def run_forward(plan: Plan, operands: list[jax.Array], start: jax.Array | None, keep: bool) -> Result:
    """start [B,N,V,K]; operands as recurrence.py has them."""
    if plan.spans == 1:
        last, *kept = recurrence_kernel(plan, keep, started=start is not None)(*operands, *_whole(start))
        return Result(last[:, :, 0], kept, None)
    first = _first_state(plan, start)
    identity = jnp.broadcast_to(jnp.eye(plan.K), (plan.B, plan.N, plan.spans - 1, plan.K, plan.K))
    states = jnp.pad(first[:, :, None], [(0, 0), (0, 0), (0, plan.spans - 2), (0, 0), (0, 0)])
    summary = recurrence_kernel(plan, keep=False, started=True, summary=True)
    (ends,) = summary(*operands, jnp.concatenate([states, identity], axis=3))
    exits, transitions = ends[:, :, :, : plan.V], ends[:, :, 1:, plan.V :]
    entries = _entry_states(first, exits, transitions)
    last, *kept = recurrence_kernel(plan, keep, started=True)(*operands, entries)
    return Result(last[:, :, -1], kept, transitions)


def run_backward(
    plan: Plan, operands: list[jax.Array], start: jax.Array | None, transitions: jax.Array | None
) -> list[jax.Array]:
    """The gradients of the initial state, of v, and of the states at the chunks' exits.

    start is the gradient of the final state [B,N,V,K], transitions what the forward run left.
    """
    if transitions is None:
        run = recurrence_kernel(plan, keep=True, reverse=True, started=start is not None)
        last, *kept = run(*operands, *_whole(start))
        return [last[:, :, 0], *kept]
    first = _first_state(plan, start)
    starts = jnp.pad(first[:, :, None], [(0, 0), (0, 0), (plan.spans - 2, 0), (0, 0), (0, 0)])
    (ends,) = recurrence_kernel(plan, keep=False, reverse=True, started=True, summary=True)(*operands, starts)
    turned = jnp.swapaxes(jnp.flip(transitions, axis=2), 3, 4)
    entries = jnp.flip(_entry_states(first, jnp.flip(ends, axis=2), turned), axis=2)
    last, *kept = recurrence_kernel(plan, keep=True, reverse=True, started=True)(*operands, entries)
    return [last[:, :, 0], *kept]


def _whole(start: jax.Array | None) -> list[jax.Array]:
    return [] if start is None else [start[:, :, None]]


def _first_state(plan: Plan, start: jax.Array | None) -> jax.Array:
    return jnp.zeros((plan.B, plan.N, plan.V, plan.K), jnp.float32) if start is None else start


def _entry_states(first: jax.Array, exits: jax.Array, transitions: jax.Array) -> jax.Array:
    """[B,N,spans,V,K] in the order of the run: first, exits of the first span, and so on.

    exits [B,N,spans-1,V,K], the first of them from first, the others from zero; transitions those of the others.
    """
    states = [first, exits[:, :, 0]]
    for i in range(1, exits.shape[2]):
        moved = jnp.matmul(states[-1], transitions[:, :, i - 1], precision=lax.Precision.HIGHEST)
        states.append(moved + exits[:, :, i])
    return jnp.stack(states, axis=2)
