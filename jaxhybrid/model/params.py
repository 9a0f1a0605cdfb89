"""One declaration per parameter: shape, logical axes, initializer. Init, sharding, checkpoints and export read it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]  # nested dict of arrays
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> float32 array


def normal(std: float = 0.02) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


@dataclass(frozen=True)
class ParamSpec:
    """What a parameter is before it has a value. `axes` are logical names that the sharding rules map to mesh axes."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    float32: bool = False  # kept in float32 in the forward pass too (gates and decays)

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)

    def stacked(self, count: int) -> "ParamSpec":
        """The same parameter for `count` layers, on a new leading axis."""
        init = self.init

        def init_layers(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.vmap(lambda k: init(k, shape[1:]))(jax.random.split(key, count))

        return replace(self, shape=(count, *self.shape), axes=("layers", *self.axes), init=init_layers)


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def initialize(specs: Params, key: jax.Array) -> Params:
    """Draws every declared parameter in float32; pure, so it can be jitted with sharded outputs."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [spec.init(k, spec.shape) for spec, k in zip(leaves, keys)])


def abstract(specs: Params, dtype: Any = jnp.float32) -> Params:
    """The shapes of the parameters without values."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs, is_leaf=is_spec)


def count_parameters(specs: Params) -> int:
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def cast_params(params: Params, specs: Params, dtype: Any) -> Params:
    """Parameters in the compute dtype; the ones declared float32 stay."""
    return jax.tree.map(lambda s, p: p if s.float32 else p.astype(dtype), specs, params, is_leaf=is_spec)
