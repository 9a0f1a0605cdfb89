"""A recurrence with a gradient written by hand, made of its two directions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

type Results = tuple[jax.Array, jax.Array]


def differentiable[Plan, Inputs, Residuals](
    forward: Callable[[Inputs, Any, Plan, bool], tuple[Results, Residuals | None]],
    backward: Callable[[Inputs, Residuals, Any, Any, Plan], tuple[Inputs, Any]],
    unused_is_none: bool = False,
) -> Callable[[Plan, Inputs, Any], Results]:
    """operator(plan, inputs, initial state) -> (out, final state), differentiable by inputs and initial state.

    plan:     hashable, everything static about the call.
    forward:  (inputs, initial state, plan, keep) -> (results, what the backward needs beside the inputs if keep).
    backward: (inputs, residuals, gradient of out, of the final state, plan) -> (gradients of the inputs, of the initial
              state), None for integers and for what is None.
    unused_is_none: the backward gets None, not zeros, as the gradient of a result that nobody used.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def operator(plan: Plan, inputs: Inputs, initial_state: Any) -> Results:
        return forward(inputs, initial_state, plan, False)[0]

    def keep(plan: Plan, inputs: Inputs, initial_state: Any) -> tuple[Results, tuple[Inputs, Residuals]]:
        if unused_is_none:
            inputs, initial_state = custom_vjp_primal_tree_values((inputs, initial_state))
        results, residuals = forward(inputs, initial_state, plan, True)
        assert residuals is not None
        return results, (inputs, residuals)

    def pull(plan: Plan, kept: tuple[Inputs, Residuals], gradients: tuple[Any, Any]) -> tuple[Inputs, Any]:
        d_out, d_final = (None if isinstance(gradient, SymbolicZero) else gradient for gradient in gradients)
        return backward(*kept, d_out, d_final, plan)

    operator.defvjp(keep, pull, symbolic_zeros=unused_is_none)
    return operator
