"""Forward kernel: one pass over time per group of heads, the states held in VMEM.

A grid step takes CHUNK tokens of several heads. Nothing before the state's products depends on the state, so that Gram
matrices and inverses of all heads come first and their latencies hide one another.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.tpu.channel_gates import (
    ChannelHead,
    Tokens,
    channel_constants,
    channel_operands,
    chunk_tokens,
    keep_scores,
)
from jaxhybrid_kernels.tpu.gates import (
    HeadGates,
    across,
    gate_names,
    gate_rows,
    grid_step_gates,
    make_gates,
    scale_rows,
)
from jaxhybrid_kernels.tpu.head_gates import head_operands
from jaxhybrid_kernels.tpu.launch import chunk_block, launch, state_block, token_block, whole_block
from jaxhybrid_kernels.tpu.layout import CHUNK, Layout, lay_out, lay_out_state, take_back_state
from jaxhybrid_kernels.tpu.norms import Norms, norm_arrays, normalize
from jaxhybrid_kernels.tpu.operands import scale_columns
from jaxhybrid_kernels.tpu.products import product
from jaxhybrid_kernels.tpu.solve import halves, solve
from jaxhybrid_kernels.tpu.turns import Chain, take_turns
from jaxhybrid_kernels.tpu.waiting import set_aside, unknown_zero


class Arrays(NamedTuple):
    """What the kernels read, laid out (see layout.py)."""

    q: Any
    k: Any
    v: Any
    log_decay: Any  # [B,n*C,N*K] when per channel, else None
    gates: Any
    constants: Any  # of per-channel decays (see channel_gates.py), else None


class Residuals(NamedTuple):
    """What the backward keeps beside the inputs."""

    states: Any  # [B,N,n,K,V] entry states, compute dtype
    inverses: Any  # [B,N,n,C/2,C] compute dtype, see solve.py; None for the additive rule
    scores: Any  # [B,N,n,R*C,C] compute dtype, see channel_gates.keep_scores; None without a decay per channel


class Waiting(NamedTuple):
    """Scratch for what the later turns of a head need, see waiting.py."""

    read: Any  # [1,(1+R)*C,V] float32: what k and q read of the entry state
    coupling: Any  # [1,C,C] float32
    pair: Any  # [1,R*C,C] compute dtype
    norms: Norms | None


class Results(NamedTuple):
    out: Any  # [B,n*C,out_heads*V]
    final: Any  # [B,N,K,V]
    kept: Residuals | None


def lay_out_inputs(inputs: Inputs, layout: Layout) -> Arrays:
    ids = inputs.segment_ids
    log_decay = constants = None
    if inputs.log_decay is not None and layout.decay == "channel":
        log_decay = lay_out(inputs.log_decay, ids, layout.K, jnp.float32)
        constants = jax.tree.map(jnp.asarray, channel_constants(CHUNK, layout.exact))
    return Arrays(
        lay_out(inputs.q, ids, layout.K, layout.dtype),
        lay_out(inputs.k, ids, layout.K, layout.dtype),
        lay_out(inputs.v, ids, layout.V, layout.dtype),
        log_decay,
        make_gates(inputs, layout),
        constants,
    )


def tpu_forward(
    inputs: Inputs, initial_state: jax.Array, layout: Layout, keep: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals | None]:
    """((out, final state), residuals if they are to be kept)."""
    sizes, K, V = layout.sizes, layout.K, layout.V
    kept = kept_blocks = None
    if keep:
        kept, kept_blocks = residual_arrays(layout), residual_blocks(layout)
    outputs = Results(
        jax.ShapeDtypeStruct((sizes.B, layout.chunks * CHUNK, sizes.out_heads * V), inputs.v.dtype),
        jax.ShapeDtypeStruct((sizes.B, sizes.N, K, V), jnp.float32),
        kept,
    )
    results = launch(
        partial(forward_kernel, layout=layout),
        "linear_attention_forward",
        layout,
        (lay_out_inputs(inputs, layout), lay_out_state(initial_state, layout)),
        (input_blocks(layout), state_block(layout)),
        outputs,
        Results(token_block(layout, sizes.out_heads, V), state_block(layout), kept_blocks),
        (jax.ShapeDtypeStruct((layout.heads, K, V), jnp.float32), waiting_arrays(layout)),
    )
    out = results.out.reshape(sizes.B, -1, sizes.out_heads, V)[:, : sizes.T, :, : sizes.V]
    return (out, take_back_state(results.final, layout)), results.kept


def input_blocks(layout: Layout) -> Arrays:
    sizes, constants = layout.sizes, None
    if layout.decay == "channel":
        constants = jax.tree.map(lambda x: whole_block(x.shape), channel_constants(CHUNK, layout.exact))
    return Arrays(
        token_block(layout, sizes.Hq, layout.K),
        token_block(layout, sizes.Hk, layout.K),
        token_block(layout, sizes.N, layout.V),
        token_block(layout, sizes.N, layout.K) if layout.decay == "channel" else None,
        chunk_block(1, gate_rows(layout), CHUNK) if gate_names(layout) else None,
        constants,
    )


def residual_arrays(layout: Layout) -> Residuals:
    lead = (layout.sizes.B, layout.sizes.N, layout.chunks)
    states = jax.ShapeDtypeStruct((*lead, layout.K, layout.V), layout.dtype)
    inverses = jax.ShapeDtypeStruct((*lead, CHUNK // 2, CHUNK), layout.dtype)
    scores = jax.ShapeDtypeStruct((*lead, layout.queries * CHUNK, CHUNK), layout.dtype)
    return Residuals(states, inverses if layout.delta else None, scores if layout.decay == "channel" else None)


def residual_blocks(layout: Layout) -> Residuals:
    states = chunk_block(layout.heads, layout.K, layout.V)
    inverses = chunk_block(layout.heads, CHUNK // 2, CHUNK) if layout.delta else None
    scores = chunk_block(layout.heads, layout.queries * CHUNK, CHUNK) if layout.decay == "channel" else None
    return Residuals(states, inverses, scores)


def waiting_arrays(layout: Layout) -> list[Waiting] | None:
    """One for each head; the additive rule has too few turns to need any."""
    if not layout.delta:
        return None
    rows = layout.queries * CHUNK
    read = jax.ShapeDtypeStruct((1, CHUNK + rows, layout.V), jnp.float32)
    coupling = jax.ShapeDtypeStruct((1, CHUNK, CHUNK), jnp.float32)
    pair = jax.ShapeDtypeStruct((1, rows, CHUNK), layout.dtype)
    return [Waiting(read, coupling, pair, norm_arrays(layout, backward=False))] * layout.heads


def forward_kernel(
    arrays: Arrays,
    initial_ref: Any,
    results: Results,
    state_ref: Any,
    waiting: list[Waiting] | None,
    *,
    layout: Layout,
) -> None:
    time = pl.program_id(2)

    @pl.when(time == 0)
    def _():
        state_ref[...] = initial_ref[0]

    gates = grid_step_gates(arrays.gates, layout)
    tokens = chunk_tokens(gates[0], CHUNK) if layout.decay == "channel" else None
    zero = unknown_zero(2)
    take_turns(
        [
            _head(
                h, gates[h], tokens, arrays, results, state_ref, None if waiting is None else waiting[h], zero, layout
            )
            for h in range(layout.heads)
        ]
    )

    @pl.when(time == layout.chunks - 1)
    def _():
        results.final[0] = state_ref[...]


def _head(
    h: int,
    gates: HeadGates,
    tokens: Tokens | None,
    arrays: Arrays,
    results: Results,
    state_ref: Any,
    waiting: Waiting | None,
    zero: jax.Array,
    layout: Layout,
) -> Chain[None]:
    """One head's chunk."""
    kept, dtype = results.kept, layout.dtype
    entry = state_ref[h].astype(dtype)
    q, k = read_query_key(arrays, h, layout)
    norms = None
    if waiting is not None and waiting.norms is not None:
        gates, norms = normalize(q, k, gates, layout, waiting.norms, zero)
    beta = gates.beta_row

    def read_state(q_in: jax.Array, k_in: jax.Array) -> jax.Array:
        return product(jnp.concatenate([k_in, q_in], axis=0) if layout.delta else q_in, entry)

    if tokens is None:  # the states are read first: that takes the matrix units while decays are made
        read = read_state(q, k)
        operands = yield from head_operands(q, k, gates, beta)
    else:
        operands = yield from channel_operands(read_channels(arrays, h, layout), tokens, layout.delta)
        if kept is not None:
            kept.scores[0, h, 0] = keep_scores(operands, dtype)
        operands = scale_columns(operands, beta)
        read = read_state(operands.q_in, operands.k_in)
        yield
    read = scale_rows(read, operands.row_in)
    pair = operands.pair.astype(dtype)
    solution = read_head(arrays.v, h, layout.V).astype(jnp.float32)
    if norms is not None:
        solution = scale_rows(solution, norms.key[...])
    if operands.coupling is not None and waiting is not None:
        read = set_aside(waiting.read, read, zero)
        coupling = set_aside(waiting.coupling, operands.coupling, zero)
        pair = set_aside(waiting.pair, pair, zero)
        matrix = yield from halves(coupling, layout.exact, dtype)
        solution = yield from solve(matrix, solution - read[:CHUNK])
        read = read[CHUNK:]
        if kept is not None:
            kept.inverses[0, h, 0] = matrix.inverses
    if kept is not None:
        kept.states[0, h, 0] = entry
    # What reads the solution and what writes it to the state, in one product.
    writing = operands.k_out.T if tokens is not None else read_key(arrays, h, layout).T
    weights = operands.lanes_out
    if beta is not None:
        weights = beta if weights is None else weights * beta
    if weights is not None:
        writing = (writing * weights).astype(dtype)
    rows = pair.shape[0]
    both = product(jnp.concatenate([pair[...], writing], axis=0), solution.astype(dtype))
    state_ref[h] = scale_state(state_ref[h], operands.carry) + both[rows:]
    out = layout.scale * (read + both[:rows])
    if norms is not None:
        out = scale_rows(out, norms.query_inverse[...])
    for r in range(layout.queries):
        write_head(results.out, h * layout.queries + r, out[r * CHUNK : (r + 1) * CHUNK])


def read_head(ref: Any, head: int, width: int) -> jax.Array:
    """[C,width] of one head of a block [1,C,heads*width]."""
    return ref[0, :, head * width : (head + 1) * width]


def write_head(ref: Any, head: int, value: jax.Array) -> None:
    width = value.shape[1]
    ref[0, :, head * width : (head + 1) * width] = value.astype(ref.dtype)


def read_query_key(arrays: Arrays, head: int, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """q [R*C,K] and k [C,K] of a value head."""
    queries = [read_head(arrays.q, i, layout.K) for i in layout.query_heads_of(head)]
    q = queries[0] if len(queries) == 1 else jnp.concatenate(queries, axis=0)
    return q, read_key(arrays, head, layout)


def read_key(arrays: Arrays, head: int, layout: Layout) -> jax.Array:
    """k [C,K] of a value head."""
    return read_head(arrays.k, layout.key_head_of(head), layout.K)


def read_channels(arrays: Arrays, head: int, layout: Layout) -> ChannelHead:
    """A value head with a decay per channel."""
    log_decay = read_head(arrays.log_decay, head, layout.K)
    return ChannelHead(*read_query_key(arrays, head, layout), log_decay, arrays.constants)


def scale_state(state: jax.Array, carry: jax.Array | None) -> jax.Array:
    """state [K,V] times carry [1,LANES] or [K,1]; a missing carry is one."""
    if carry is None:
        return state
    return state * (across(carry, state.shape[1]) if carry.shape[0] == 1 else carry)
