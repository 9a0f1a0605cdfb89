"""Checks of values, not only of shapes: they wait for the device, so they are off unless asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import numpy as np

_asked_for: ContextVar[bool] = ContextVar("debug_checks", default=False)


@contextmanager
def debug_checks() -> Iterator[None]:
    """Within it, every operator refuses a log_decay that is positive or not finite at a token that is no padding.

    The ValueError names the worst value and its index. It comes before anything is compiled where values are known; in
    code that is traced (by `jax.jit`, `jax.grad`, ...) it is raised when the code runs, as JAX reports errors in host
    callbacks. What was compiled before, outside of it, stays unchecked.
    """
    before = _asked_for.set(True)
    try:
        yield
    finally:
        _asked_for.reset(before)


def check_log_decay(log_decay: jax.Array | None, segment_ids: jax.Array | None = None) -> None:
    """log_decay [B,T,...] with segment_ids [B,T], or one token's [B,...] without."""
    if log_decay is None or not _asked_for.get():
        return
    if any(isinstance(x, jax.core.Tracer) for x in (log_decay, segment_ids)):
        jax.debug.callback(_check_values, log_decay, segment_ids)
    else:
        _check_values(log_decay, segment_ids)


def _check_values(log_decay: jax.Array, segment_ids: jax.Array | None) -> None:
    values = np.asarray(log_decay, np.float64)
    allowed = (values <= 0) & np.isfinite(values)
    if segment_ids is not None:
        padding = np.asarray(segment_ids) == 0
        allowed |= padding.reshape(*padding.shape, *(1,) * (values.ndim - 2))
    if not allowed.all():
        how_wrong = np.where(allowed, -1, np.where(np.isnan(values), np.inf, np.abs(values)))
        worst = tuple(int(i) for i in np.unravel_index(np.argmax(how_wrong), values.shape))
        raise ValueError(f"log_decay has the value {values[worst]} at {list(worst)}, expected finite values <= 0.")
