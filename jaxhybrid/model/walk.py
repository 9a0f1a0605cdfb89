"""The one loop over the layers: training, scoring, alignment and decoding are bodies of it.

Layers of one kind are one `lax.scan`. Where kinds alternate there are two ways. By default all layers are one scan, in
which a `lax.switch` picks the kind: compile time follows the kinds and not their pattern, and the choice may be traced.
Each kind's rows are then spread over all layers, zeros where a layer is of another kind: rows taken by index from the
whole stack would add a gradient of the whole stack in every turn. `by_run` scans each run of equal layers by itself:
no choice at run time and nothing spread, which is for decoding, where there are states instead of gradients.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.blueprint import Params, bind
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, layers_of_kind
from jaxhybrid.model.layers import Block, TokenContext
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import gather

# (norm x [B,T,D], mixer, context, extra) -> (mixed [B,T,D], result)
Mix = Callable[[jax.Array, Any, TokenContext, Any], tuple[jax.Array, Any]]


def walk(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    context: TokenContext,
    mix: Mix,
    *,
    extra: Params | None = None,
    softmax: jax.Array | None = None,
    by_run: bool = False,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """x [B,T,D] through all blocks: x + mixed, then + mlp, where (mixed, result) = mix(norm x, mixer, context, extra).

    Args:
        params: of the whole model, in the compute dtype.
        extra: per kind, what else `mix` gets: a stack with a row for each of its layers.
        softmax: [L] bool, traced: see `hidden_states`.
        remat: keep only x between the blocks for the backward pass. Where kinds share a scan `mix` then closes over no
            array.

    Returns:
        x after the last block, and by kind the stacked results. Where kinds share a scan there are no extras and no
        results: a `lax.switch` would have to make them for every kind.
    """
    results: dict[str, list[Any]] = {kind: [] for kind in config.layer_types}
    for start, stop in _runs(config.layer_types) if by_run else [(0, config.num_layers)]:
        kinds, which = _choice(config.layer_types[start:stop], softmax)
        stacks, shared = {}, {}
        for kind in kinds:
            stack = params["mixers"][kind]
            if softmax is None:
                stacks[kind] = spread(stack, config.layer_types, kind, start, stop)
            elif jax.tree.leaves(stack)[0].shape[0] == config.num_layers:
                stacks[kind] = stack
            else:
                shared[kind] = jax.tree.map(lambda w: jnp.squeeze(w, 0), stack)
        own = None if extra is None else spread(extra[kinds[0]], config.layer_types, kinds[0], start, stop)
        apply = _one_of(kinds, config, mix, remat) if len(kinds) > 1 else _only(kinds[0], config, mix, remat)

        def body(x: jax.Array, scanned: Any, apply: Any = apply, shared: Params = shared) -> tuple[jax.Array, Any]:
            which, block_params, rows, own = scanned
            return apply(which, x, context, block_params, rows | shared, own)

        scanned = which, take_layers(params["blocks"], start, stop), stacks, own
        x, result = jax.lax.scan(body, x, scanned)
        if len(kinds) == 1:
            results[kinds[0]].append(result)
    return x, {kind: _joined(found) for kind, found in results.items() if found}


def _mixed(
    kind: str, config: ModelConfig, mix: Mix, normed: jax.Array, context: TokenContext, rows: Params, own: Any
) -> tuple[jax.Array, Any]:
    with jax.named_scope(kind):
        return mix(normed, bind(MIXERS[kind], config, gather(rows[kind])), context, own)


def _only(kind: str, config: ModelConfig, mix: Mix, remat: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """The block of layers of one kind: (which, x, context, block, {kind: mixer}, extra) -> (x, result)."""

    def apply(
        which: jax.Array, x: jax.Array, context: TokenContext, block_params: Params, rows: Params, own: Any
    ) -> tuple[jax.Array, Any]:
        block = bind(Block, config, gather(block_params))
        mixed, result = _mixed(kind, config, mix, block.input_norm(x), context, rows, own)
        return block.add_mlp(x + mixed), result

    return jax.checkpoint(apply) if remat else apply


def _one_of(kinds: tuple[str, ...], config: ModelConfig, mix: Mix, remat: bool) -> Callable[..., Any]:
    """The block of a layer whose kind is number `which` of `kinds`.

    With `remat` by a gradient of its own, of the whole block in each branch: JAX's would carry what every branch wants
    to keep out of one switch and into the next, zeros for all but the branch that was taken.
    """

    def apply(which: jax.Array, x: jax.Array, context: TokenContext, block_params: Params, rows: Params) -> jax.Array:
        block = bind(Block, config, gather(block_params))
        branches = [
            lambda normed, rows, kind=kind: _mixed(kind, config, mix, normed, context, rows, None)[0] for kind in kinds
        ]
        return block.add_mlp(x + jax.lax.switch(which, branches, block.input_norm(x), rows))

    def block_of(kind: str, x: jax.Array, context: TokenContext, block_params: Params, rows: Params) -> jax.Array:
        return _only(kind, config, mix, remat=False)(
            which=None, x=x, context=context, block_params=block_params, rows=rows, own=None
        )[0]

    @jax.custom_vjp
    def recomputed(which: jax.Array, *operands: Any) -> jax.Array:
        return jax.lax.switch(which, [partial(block_of, kind) for kind in kinds], *operands)

    def backward(saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        which, x, context, block_params, rows = saved

        def pull(kind: str) -> Callable[..., Any]:
            def run(x: jax.Array, context: TokenContext, block_params: Params, rows: Params, cotangent: Any) -> Any:
                block = lambda x, block_params, rows: block_of(kind, x, context, block_params, rows)  # noqa: E731
                return jax.vjp(block, x, block_params, rows)[1](cotangent)

            return run

        branches = [pull(kind) for kind in kinds]
        x, block_params, rows = jax.lax.switch(which, branches, x, context, block_params, rows, cotangent)
        return None, x, None, block_params, rows

    recomputed.defvjp(lambda *operands: (recomputed(*operands), operands), backward)
    chosen = recomputed if remat else apply
    return lambda which, x, context, block_params, rows, own: (chosen(which, x, context, block_params, rows), None)


def _runs(layer_types: tuple[str, ...]) -> list[tuple[int, int]]:
    """[start, stop) of neighbouring layers of one kind."""
    ends = np.cumsum([len(list(group)) for _, group in groupby(layer_types)]).tolist()
    return list(zip([0, *ends], ends))


def _choice(layer_types: tuple[str, ...], softmax: jax.Array | None) -> tuple[tuple[str, ...], jax.Array]:
    """The kinds of some layers, and which of them each layer is."""
    kinds = tuple(dict.fromkeys(layer_types))
    if softmax is None:
        return kinds, jnp.array([kinds.index(kind) for kind in layer_types], jnp.int32)
    (linear,) = kinds
    return (linear, FULL_ATTENTION), softmax.astype(jnp.int32)


def spread(stack: Any, layer_types: tuple[str, ...], kind: str, start: int = 0, stop: int | None = None) -> Any:
    """A kind's rows at its layers of [start, stop), zeros at the others."""
    places, types = layers_of_kind(layer_types, kind), layer_types[start:stop]

    def own(x: jax.Array) -> jax.Array:
        nothing = jnp.zeros_like(take_layers(x, 0, 1))
        pieces = []
        for begin, end in _runs(types):
            if types[begin] == kind:
                first = places.index(start + begin)
                pieces.append(take_layers(x, first, first + end - begin))
            else:
                pieces.append(jnp.broadcast_to(nothing, (end - begin, *x.shape[1:])))
        return _joined(pieces)

    return jax.tree.map(own, stack)


def collect(rows: Any, layer_types: tuple[str, ...], kind: str) -> Any:
    """The reverse of `spread` over all layers: the rows of a kind's layers."""
    pieces = [take_layers(rows, begin, end) for begin, end in _runs(layer_types) if layer_types[begin] == kind]
    return _joined(pieces)


def _joined(runs: list[Any]) -> Any:
    return runs[0] if len(runs) == 1 else jax.tree.map(lambda *rows: jnp.concatenate(rows), *runs)


def take_layers(stacked: Any, start: int, stop: int) -> Any:
    """Rows [start, stop) of every stacked parameter.

    By `split`, whose transpose is one concatenation, where that of slicing adds a zero-padded array per run.
    """

    def take(x: jax.Array) -> jax.Array:
        if (start, stop) == (0, x.shape[0]):
            return x
        sizes = (start, stop - start, x.shape[0] - stop)
        return jax.lax.split(x, sizes)[1]

    return jax.tree.map(take, stacked)
