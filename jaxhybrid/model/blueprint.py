"""Modules and plain dicts: a module declares one layer's part, everything outside it works on dicts of arrays.

    variables(part, config)          what a part declares: shapes, logical axes, kinds; nothing is drawn
    initialize(part, config, key)    fresh values, as a dict; pure and jittable
    bind(part, config, params)       the module of such a dict, to call it

A part is a class of `flax.nnx.Module` made from (config, rngs). Stacks of layers are dicts with a leading layer axis:
a stacked module would carry that axis in its metadata when it is sliced, and its metadata into optimizers.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxhybrid.errors import WeightsError
from jaxhybrid.model.config import ModelConfig

Params = dict[str, Any]  # nested dict of arrays
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> float32 array


class Exact(nnx.Param):
    """A parameter that is float32 in the forward pass and in files, whatever the rest is: gates and decays."""


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer = normal,
    kind: type[nnx.Param] = nnx.Param,
    **metadata: Any,
) -> Any:
    """A parameter. `axes` are logical names, which `ShardingRules` maps to mesh axes; Flax shall not apply them itself,
    for it would look for axes of the mesh."""
    assert len(shape) == len(axes), (shape, axes)
    return kind(init(rngs.params(), shape), out_sharding=axes, eager_sharding=False, **metadata)


def is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


@lru_cache
def _blueprint(part: type[nnx.Module], config: ModelConfig) -> tuple[Any, Any]:
    """(structure, variables without values)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: part(config, nnx.Rngs(0))))  # type: ignore[call-arg]
    return graph, nnx.to_pure_dict(state, extract_fn=lambda variable: variable)


def variables(part: type[nnx.Module], config: ModelConfig, layers: int | None = None) -> Params:
    """What `part` declares: a dict of Variables that hold shapes, of stacks of `layers` rows where that is given."""

    def stacked(variable: nnx.Variable) -> nnx.Variable:
        shape, axes = variable.shape, variable.out_sharding
        return variable.replace(jax.ShapeDtypeStruct((layers, *shape), jnp.float32), out_sharding=("layers", *axes))

    own = stacked if layers is not None else lambda variable: variable
    return jax.tree.map(own, _blueprint(part, config)[1], is_leaf=is_variable)


def bind[Part: nnx.Module](part: type[Part], config: ModelConfig, params: Params) -> Part:
    """The module whose parameters these are."""
    return nnx.merge(_blueprint(part, config)[0], params)


def initialize(part: type[nnx.Module], config: ModelConfig, key: jax.Array, layers: int | None = None) -> Params:
    """Fresh float32 parameters, of several layers with `layers`; pure, so it can be jitted with sharded outputs."""

    def one(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(part(config, nnx.Rngs(key))))  # type: ignore[call-arg]

    return one(key) if layers is None else jax.vmap(one)(jax.random.split(key, layers))


def cast(declared: Params, params: Params, dtype: Any) -> Params:
    """Parameters in the compute dtype; those declared `Exact` stay."""
    return jax.tree.map(
        lambda variable, x: x if isinstance(variable, Exact) else x.astype(dtype), declared, params, is_leaf=is_variable
    )


def check_names(declared: Params, params: Params) -> None:
    """Raises WeightsError if there are other parameters than were declared."""
    if differing := shapes_by_name(declared).keys() ^ shapes_by_name(params).keys():
        raise WeightsError(f"Parameters and model config do not agree about {', '.join(sorted(differing)[:5])}.")


def shapes_by_name(tree: Params) -> dict[str, tuple[int, ...]]:
    """Of declared parameters, or of arrays: `blocks.mlp.up_proj.kernel` -> its shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}


def count_parameters(declared: Params) -> int:
    return sum(math.prod(variable.shape) for variable in jax.tree.leaves(declared, is_leaf=is_variable))


def count_active(declared: Params, config: ModelConfig) -> int:
    """Parameters that one token meets: of a mixture the chosen experts alone."""
    share = Fraction(1) if config.experts is None else Fraction(config.experts.active, config.experts.count)
    leaves = jax.tree.leaves(declared, is_leaf=is_variable)
    return int(sum(math.prod(x.shape) * (share if "experts" in x.out_sharding else 1) for x in leaves))
