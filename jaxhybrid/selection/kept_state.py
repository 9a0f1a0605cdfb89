"""What is kept of a candidate between two rounds of scoring: its state as it is, or one rounded to half the size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxhybrid import hosts
from jaxhybrid.files import remove
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.loop import Batches, go_to, place_of, restore_records
from jaxhybrid.train.metrics import Record, read_metrics
from jaxhybrid.train.optimizer import TrainState


class KeptState:
    """The state of one candidate at the end of its last round, in its folder.

    With `dtype` bfloat16 that is what has changed in the parameters since the start, and the moments, rounded. The next
    round goes on from the rounded state whether the process was stopped between them or not.
    """

    def __init__(self, folder: Path, dtype: Any, begin: Callable[[], TrainState]):
        self._kept, self._within = Checkpoints(folder / "kept", keep=1), folder / "checkpoints"
        self._folder = folder
        self._rounds, self._begin = dtype != jnp.float32, begin

    @property
    def step(self) -> int:
        """Updates done at the end of the last round; 0 before the first one."""
        return self._kept.latest or 0

    def restore(self, stream: Batches) -> TrainState:
        """The state to go on from, with `stream` at its next batch; the loop may have a newer one of this round."""
        start = self._begin()
        step = self.step
        if not step or (Checkpoints(self._within).latest or 0) > step:
            return start
        self._remove_within()  # left by a process that was killed between `save`'s two acts
        state, position = self._kept.restore(_like_rounded(start) if self._rounds else start)
        go_to(position["batches"], stream)
        restore_records(self._folder, position)
        return _unrounded(state, start) if self._rounds else state

    def save(self, state: TrainState, stream: Batches) -> None:
        step = int(state.step)
        if self._rounds:
            state = _rounded(state, self._begin())
        records: list[Record] = []  # the first process alone needs them
        hosts.by_first(lambda: records.extend(read_metrics(self._folder)), "records of the round")
        self._kept.save(step, state, {"batches": place_of(stream), "records": records}, wait=True)
        self._remove_within()

    def _remove_within(self) -> None:
        hosts.by_first(lambda: remove(self._within), "remove checkpoints of the round")


def _half(x: Any) -> Any:
    return jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype


def _like_rounded(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, _half(x), sharding=x.sharding), state)


@jax.jit
def _rounded(state: TrainState, start: TrainState) -> TrainState:
    change = jax.tree.map(lambda now, then: now - then, state.params, start.params)
    return jax.tree.map(lambda x: x.astype(_half(x)), TrainState(state.step, change, state.optimizer))


@jax.jit
def _unrounded(kept: TrainState, start: TrainState) -> TrainState:
    state = jax.tree.map(lambda x, like: x.astype(like.dtype), kept, start)
    params = jax.tree.map(lambda change, then: then + change, state.params, start.params)
    return TrainState(state.step, params, state.optimizer)
