"""The one loop over the layers: training, scoring and alignment are bodies of it. Decoding takes `one_layer` at a time.

All layers are one `lax.scan`, unless `unroll` asks for a program that has each of them. Where kinds alternate a
`lax.switch` picks the kind: compile time follows the kinds and not their pattern, and the choice may be traced. Each
kind's rows are then spread over all layers, zeros where a layer is of another kind: rows taken by index from the whole
stack would add a gradient of the whole stack in every turn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxhybrid_kernels.gpu.softmax_attention import KEPT

from jaxhybrid.model.blueprint import Params, bind, cast, variables
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig, Remat, layers_of_kind
from jaxhybrid.model.layers import MLP_INPUT, MLP_PRODUCT, Block, LayerView, TokenContext, layer_views
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.partition import gather, lying_as, mark, near

BLOCK_INPUT = "block_input"
POLICIES = {
    "block": None,
    "mlp": jax.checkpoint_policies.save_only_these_names(MLP_INPUT, MLP_PRODUCT, *KEPT),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip

# (norm x [B,T,D], mixer, context, extra) -> (mixed [B,T,D], result)
Mix = Callable[[jax.Array, Any, TokenContext, Any], tuple[jax.Array, Any]]
Watch = Callable[[jax.Array, jax.Array], Any]  # (x before a block, x after it) -> result


def walk(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    context: TokenContext,
    mix: Mix,
    *,
    extra: Params | None = None,
    softmax: jax.Array | None = None,
    remat: Remat = "none",
    unroll: bool = False,
    sums: Any = jnp.float32,
    watch: Watch | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """x [B,T,D] through all blocks: x + mixed, then + mlp, where (mixed, result) = mix(norm x, mixer, context, extra).

    Args:
        params: of the whole model, in any dtype; computed in that of x.
        extra: per kind, what else `mix` gets: a stack with a row for each of its layers.
        softmax: [L] bool, traced: see `hidden_states`.
        remat: what is kept for the backward pass. `none`: everything. `block`: x between the blocks. `dots`: results of
            matrix products, too. `offload`: x between the blocks, in the host's memory. `mlp`: x before each mixer and
            each MLP, the MLP's products but the last, and, where mixers of several kinds do not share a scan, what
            softmax attention's kernels take and give; blocks are cast to x's dtype once, and their gradients are of it.
            Where kinds share a scan, with `block` and `mlp`, `mix` must close over no array: its gradient is taken when
            the scan's own arrays are gone.
        unroll: no scan: the program has each layer by itself, and takes longer to compile. Kinds are then known and
            need no switch, and what a layer keeps is not copied into stacks. Blocks and mixers are cast to x's dtype
            once, whatever is kept, and their gradients are of it. Not with a traced choice.
        sums: dtype in which devices add up the gradients of their shared weights.
        watch: gives a layer's result in place of `mix`, from what goes into its block and what comes out.

    Returns:
        x after the last block, and by kind the stacked results. Where kinds share a scan there are no extras and no
        results: a `lax.switch` would have to make them for every kind.
    """
    blocks = _Blocks(config, mix, remat, sums, x.dtype, watch, casts_once=unroll or remat == "mlp")
    if unroll:
        assert softmax is None, "a traced choice of layers needs a switch"
        return _unrolled(blocks, params, x, context, extra)
    kinds, which = _choice(config.layer_types, softmax)
    stacks, shared = {}, {}
    for kind in kinds:
        stack = params["mixers"][kind]
        if len(kinds) > 1:
            stack = blocks.in_compute_dtype(MIXERS[kind], stack)
        if softmax is None:
            stacks[kind] = spread(stack, config.layer_types, kind)
        elif jax.tree.leaves(stack)[0].shape[0] == config.num_layers:
            stacks[kind] = stack
        else:
            shared[kind] = jax.tree.map(lambda w: jnp.squeeze(w, 0), stack)
    assert extra is None or len(kinds) == 1, "extras are for scans of one kind"
    block = blocks.of(kinds[0]) if len(kinds) == 1 else blocks.of_any(kinds)

    def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
        which, block_params, rows, own, view = scanned
        return block(which, x, context.at_layer(view), block_params, rows | shared, own)

    own = None if extra is None else extra[kinds[0]]
    every = params["blocks"]
    if blocks.casts_once:
        every = blocks.in_compute_dtype(Block, every)
    x, result = jax.lax.scan(body, x, (which, every, stacks, own, _views(config)))
    return x, {kinds[0]: result} if len(kinds) == 1 else {}


def _unrolled(
    blocks: "_Blocks", params: Params, x: jax.Array, context: TokenContext, extra: Params | None
) -> tuple[jax.Array, dict[str, Any]]:
    """`walk` without a scan."""
    types = blocks.config.layer_types
    each = iter(rows_of(blocks.in_compute_dtype(Block, params["blocks"])))
    rows: dict[str, Iterator[Params]] = {}
    own: dict[str, Iterator[Any]] = {}
    results: dict[str, list[Any]] = {}
    for kind in dict.fromkeys(types):
        rows[kind] = iter(rows_of(blocks.in_compute_dtype(MIXERS[kind], params["mixers"][kind])))
        own[kind] = repeat(None) if extra is None else iter(rows_of(extra[kind]))
        results[kind] = []

    @cache  # layers that are alike are traced and lowered once
    def block_of(kind: str, view: LayerView | None) -> BlockFunction:
        block = blocks.of(kind)
        return jax.jit(lambda x, context, *parts: block(None, x, context.at_layer(view), *parts))

    for kind, view in zip(types, layer_views(blocks.config)):
        x, result = block_of(kind, view)(x, context, next(each), {kind: next(rows[kind])}, next(own[kind]))
        results[kind].append(result)
    if len(results) > 1:
        return x, {}
    ((kind, found),) = results.items()
    return x, {kind: jax.tree.map(lambda *layers: jnp.stack(layers), *found)}


def one_layer(
    config: ModelConfig,
    kind: str,
    x: jax.Array,
    context: TokenContext,
    mix: Mix,
    block_params: Params,
    mixer_params: Params,
    extra: Any,
) -> tuple[jax.Array, Any]:
    """x [B,T,D] through one block with its own parameters: (x after it, the result of `mix`)."""
    block = _Blocks(config, mix, "none", jnp.float32, x.dtype).of(kind)
    return block(None, x, context, block_params, {kind: mixer_params}, extra)


# (which kind, x, context, the block's parameters, mixers' parameters by kind, extra) -> (x, result)
BlockFunction = Callable[..., tuple[jax.Array, Any]]


@dataclass(frozen=True)
class _Blocks:
    """The functions that one turn of the loop may be."""

    config: ModelConfig
    mix: Mix
    remat: Remat
    sums: Any
    dtype: Any
    watch: Watch | None = None
    casts_once: bool = False  # weights come in the compute dtype

    def of(self, kind: str, *, in_switch: bool = False) -> BlockFunction:
        """The block of layers of one kind."""

        def block(_: Any, x: jax.Array, context: TokenContext, block_params: Params, rows: Params, own: Any) -> Any:
            x, block = checkpoint_name(x, BLOCK_INPUT), self._block(block_params)
            marked = in_switch or self.casts_once
            mixed, result = self._mixed(kind, block.mixer_input(x), context, rows, own, marked)
            after = block.add_mlp(block.add_mixed(x, mixed))
            return after, result if self.watch is None else self.watch(x, after)

        return block if in_switch else self._recomputed(block)

    def of_any(self, kinds: tuple[str, ...]) -> BlockFunction:
        """The block of a layer whose kind is number `which` of `kinds`; without results."""
        if self.remat == "block":
            chosen = with_own_gradient([self._alone(kind) for kind in kinds])
            return lambda which, x, context, params, rows, own: (chosen(which, context, x, params, rows), None)

        def branch(kind: str) -> Callable[..., jax.Array]:
            return lambda context, normed, rows: self._mixed(kind, normed, context, rows, None, marked=True)[0]

        branches = [branch(kind) for kind in kinds]
        mixed_by = with_own_gradient(branches) if self.remat == "mlp" else partial(_switch, branches)

        def block(
            which: jax.Array, x: jax.Array, context: TokenContext, block_params: Params, rows: Params, own: None
        ) -> tuple[jax.Array, None]:
            x, block = checkpoint_name(x, BLOCK_INPUT), self._block(block_params)
            mixed = mixed_by(which, context, block.mixer_input(x), rows)
            return block.add_mlp(block.add_mixed(x, mixed)), None

        return self._recomputed(block)

    def _alone(self, kind: str) -> Callable[..., jax.Array]:
        block = self.of(kind, in_switch=True)
        return lambda context, x, block_params, rows: block(None, x, context, block_params, rows, None)[0]

    def in_compute_dtype(self, part: type[nnx.Module], stack: Params) -> Params:
        """Before the layers: of mixers whose rows lie there several times, of blocks that are read several times, and
        of all without a scan."""
        declared, stack = variables(part, self.config, jax.tree.leaves(stack)[0].shape[0]), near(stack)
        return cast(declared, mark(declared, stack), self.dtype)

    def _block(self, params: Params) -> Block:
        declared = variables(Block, self.config)
        return bind(Block, self.config, gather(declared, params, self.dtype, self.sums, marked=self.casts_once))

    def _mixed(
        self, kind: str, normed: jax.Array, context: TokenContext, rows: Params, own: Any, marked: bool
    ) -> tuple[jax.Array, Any]:
        part = MIXERS[kind]
        with jax.named_scope(kind):
            whole = gather(variables(part, self.config), rows[kind], self.dtype, self.sums, marked)
            return self.mix(normed, bind(part, self.config, whole), context, own)

    def _recomputed(self, block: BlockFunction) -> BlockFunction:
        return block if self.remat == "none" else jax.checkpoint(block, policy=POLICIES[self.remat])


# (context, operands) -> array
Branch = Callable[..., jax.Array]


def _switch(branches: list[Branch], which: jax.Array, context: TokenContext, *operands: Any) -> jax.Array:
    return jax.lax.switch(which, branches, context, *operands)


def with_own_gradient(branches: list[Branch]) -> Branch:
    """`_switch` whose gradient computes the branch that was taken once more, from the operands alone.

    JAX's gradient of a switch would carry what every branch wants to keep out of one switch and into the next,
    zeros for all but the branch that was taken: 5 % of a distillation step on an H200, where this is none.
    """

    @jax.custom_vjp
    def chosen(which: jax.Array, context: TokenContext, *operands: Any) -> jax.Array:
        return _switch(branches, which, context, *near(operands))

    def backward(saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        which, context, *operands = saved

        def pull(branch: Branch, context: TokenContext, cotangent: jax.Array, *operands: Any) -> Any:
            return jax.vjp(partial(branch, context), *operands)[1](cotangent)

        pulls = [partial(pull, branch) for branch in branches]
        gradients = jax.lax.switch(which, pulls, context, cotangent, *near(operands))
        return None, None, *lying_as(gradients, tuple(operands))

    chosen.defvjp(lambda *arguments: (chosen(*arguments), arguments), backward)
    return chosen


def _views(config: ModelConfig) -> LayerView | None:
    """How each layer looks at the tokens, [L]; None where all are alike."""
    first, *rest = layer_views(config)
    return first if first is None else jax.tree.map(lambda *flags: jnp.array(flags), first, *rest)


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


def spread(stack: Any, layer_types: tuple[str, ...], kind: str) -> Any:
    """A kind's rows at its layers, zeros at the others."""
    places = layers_of_kind(layer_types, kind)

    def own(x: jax.Array) -> jax.Array:
        nothing = jnp.zeros_like(take_layers(x, 0, 1))
        pieces = []
        for begin, end in _runs(layer_types):
            if layer_types[begin] == kind:
                first = places.index(begin)
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


def rows_of(stack: Any) -> list[Any]:
    """Each layer's own parameters, of a stack of them; the gradient is one concatenation, as of `take_layers`."""
    leaves, structure = jax.tree.flatten(stack)
    rows = [[jnp.squeeze(row, 0) for row in jax.lax.split(leaf, (1,) * leaf.shape[0])] for leaf in leaves]
    return [jax.tree.unflatten(structure, own) for own in zip(*rows)]


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
