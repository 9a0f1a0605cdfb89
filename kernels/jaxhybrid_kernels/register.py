"""The implementations of an operator by name, and the choice among them."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxhybrid_kernels.numerics import recurs_by_kernels, target_platform


class Implementation[Call](NamedTuple):
    """How it runs; why it cannot take the arguments, naming the value in the way, or None; and where it is the default.

    Asked for by name it runs wherever it does not refuse.
    """

    run: Callable[[Call], tuple[jax.Array, jax.Array]]
    refusal: Callable[[Call], str | None] = lambda call: None
    platform: str | None = None  # None: any
    fewest_tokens: int = 1


type Register[Call] = dict[str, Implementation[Call]]  # by name, in order of preference


def check_implementation(register: Register, name: str | None) -> None:
    if name is not None and name not in register:
        raise ValueError(f"implementation={name!r} is unknown; available: {', '.join(reversed(register))}.")


def choose[Call](register: Register[Call], name: str | None, call: Call, tokens: int) -> Implementation[Call]:
    """The one of that name, or by default the first for this platform and length that takes the arguments.

    With JAXHYBRID_LINEAR_KERNELS=0 no default is a kernel. Raises ValueError if the one of that name refuses them.
    """
    if name is not None:
        if (reason := register[name].refusal(call)) is not None:
            raise ValueError(reason)
        return register[name]
    own = target_platform() if recurs_by_kernels() else None
    return next(
        entry
        for entry in register.values()
        if entry.platform in (None, own) and tokens >= entry.fewest_tokens and entry.refusal(call) is None
    )
