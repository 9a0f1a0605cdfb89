"""The step of a stage as a run compiles it, with random weights and tokens, timed: for plan_check.py and scaling.py.

Neither weights nor tokens change what a step costs; how long documents are does (`documents`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.plan.planned import Planned
from jaxhybrid.stages.programs import stage_program

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "qwen2.5-3b-instruct.yaml"  # whose lengths and settings are measured


@cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[[jax.Array], jax.Array]:
    def make(key: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        return 0.02 * jax.random.normal(key, shape, dtype)

    return jax.jit(make, out_shardings=sharding)


def random_values(abstract: Any, seed: int) -> Any:
    """Arrays of these shapes, types and places: normal for weights, zeros for counts. One at a time, so that no more
    memory is taken than they lie in; those of one shape and place by one program."""
    leaves, tree = jax.tree.flatten(abstract)
    made = [
        jax.block_until_ready(_maker(leaf.shape, leaf.dtype, leaf.sharding)(jax.random.key(1000 * seed + number)))
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def batch_values(abstract: Any, vocab_size: int, documents: list[int] | None) -> Any:
    """Random tokens in documents of so many tokens, at least and at most; None: each row is one."""
    rng = np.random.default_rng(0)
    shape = abstract["tokens"].shape
    ids = np.ones(shape, np.int32)
    if documents:
        for row in ids.reshape(-1, shape[-1]):
            ends = np.cumsum(rng.integers(*documents, size=shape[-1] // documents[0] + 1))
            row[:] = np.searchsorted(ends, np.arange(shape[-1]), side="right") + 1
    values = {"tokens": rng.integers(0, vocab_size, size=shape, dtype=np.int32), "segment_ids": ids}
    placed = {name: jax.device_put(value, abstract[name].sharding) for name, value in values.items()}
    return placed | random_values({name: x for name, x in abstract.items() if name not in values}, seed=2)


@dataclass
class StageStep:
    """A stage's jitted update, its state, and what else it takes. Its mesh must be active in every call."""

    step: Any
    state: Any
    rest: list[Any]

    @staticmethod
    def of(stage: str, planned: Planned, documents: list[int] | None = None) -> "StageStep":
        """Of a config, on the config's mesh; documents as in `batch_values`."""
        student = planned.linear if stage in ("align", "score") else planned.hybrid
        step, (state, *rest) = stage_program(stage, planned.config, student, planned.teacher, jax.sharding.get_mesh())
        state = random_values(state, seed=0)
        absolute = jax.jit(lambda tree: jax.tree.map(jnp.abs, tree), donate_argnums=0)  # no second moment is negative
        state = replace(state, optimizer=absolute(state.optimizer))
        given = [
            batch_values(x, planned.teacher.vocab_size, documents) if isinstance(x, dict) else random_values(x, seed=1)
            for x in rest
        ]
        return StageStep(step, state, given)

    def take(self) -> float:
        """One step; its loss, once all of it is done."""
        self.state, metrics = self.step(self.state, *self.rest)
        jax.block_until_ready((self.state, metrics))
        return float(metrics["loss"])

    def seconds(self, steps: int, warm: int = 2) -> list[float]:
        """Of the first `warm` steps, which compile, and of `steps` after them."""
        times = []
        for _ in range(warm + steps):
            began = time.perf_counter()
            self.take()
            times.append(time.perf_counter() - began)
        return times
