"""Per-channel decays inside the TPU kernels, as plain functions: against the float64 form of the XLA code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels import channel_gates as xla
from jaxhybrid_kernels import head_gates
from jaxhybrid_kernels.chunk_layout import Chunks
from jaxhybrid_kernels.tpu import channel_gates as tpu
from jaxhybrid_kernels.tpu.channel_gradients import channel_gradients
from jaxhybrid_kernels.tpu.gates import HeadGates
from jaxhybrid_kernels.tpu.operands import StateGradients
from jaxhybrid_kernels.tpu.turns import take_turns

C, K, SCALE = 128, 32, 0.3
SEGMENTS = np.repeat([0, 1, 2], [50, 61, 17])
LOG_DECAYS = {
    "weak": lambda rng: -0.05 * np.abs(rng.normal(size=(C, K))),
    "strong": lambda rng: -20.0 * np.abs(rng.normal(size=(C, K))),
    "none": lambda rng: np.zeros((C, K)),
    "a token forgets": lambda rng: np.where(np.isin(np.arange(C), (3, 70))[:, None], -3000.0, -0.01) * np.ones((C, K)),
}


def chunk_gates(packed):
    """What a kernel knows of tokens: in the entry state's segment, in the last token's, and where each segment ends."""
    gates = HeadGates(*[None] * len(HeadGates._fields))
    if not packed:
        return gates
    ends = np.searchsorted(SEGMENTS, SEGMENTS, side="right")

    def column(condition):
        return jnp.asarray(np.repeat(condition[:, None], 128, axis=1), jnp.float32)

    return gates._replace(
        end_row=jnp.asarray(ends[None], jnp.float32),
        entry=column(SEGMENTS == 0),
        exit=column(SEGMENTS[-1] == SEGMENTS),
    )


@partial(jax.jit, static_argnames=("packed", "delta"))
def in_kernel(q, k, log_decay, gradients, packed, delta):
    constants = tpu.channel_constants(C, q.dtype == jnp.float32)
    tokens = tpu.chunk_tokens(chunk_gates(packed), C)
    head = tpu.ChannelHead(q, k, log_decay, constants)
    operands = take_turns([tpu.channel_operands(head, tokens, delta)])[0]
    kept = tpu.kept_operands(head, tokens, tpu.keep_scores(operands, q.dtype), delta)
    scaled = [x._replace(pair=SCALE * x.pair) for x in (operands, kept)]
    return *scaled, take_turns([channel_gradients(head, tokens, constants, gradients, SCALE)])[0]


@pytest.mark.parametrize("decay", LOG_DECAYS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("R", "packed", "delta"), [(1, False, True), (2, True, True), (2, False, False)])
def test_operands_and_gradients(suite, decay, dtype, tolerance, R, packed, delta):
    rng = np.random.default_rng(0)
    log_decay = np.asarray(LOG_DECAYS[decay](rng), np.float32)
    q, k = (np.asarray(jnp.asarray(rng.normal(size=(n, K)) / 6, dtype), np.float64) for n in (R * C, C))
    gradients = StateGradients(
        q_in=rng.normal(size=(R * C, K)),
        k_in=rng.normal(size=(C, K)) if delta else None,
        k_out=rng.normal(size=(C, K)),
        carry=rng.normal(size=(K, 1)),
        pair=rng.normal(size=(R * C, C)),
        coupling=np.tril(rng.normal(size=(C, C)), -1) if delta else None,
    )
    with jax.enable_x64(True):

        def lead(x, *shape):
            return None if x is None else jnp.asarray(np.reshape(x, (1, 1, 1, *(shape or np.shape(x)))), jnp.float64)

        chunks = Chunks(
            lead(q, R, C, K),
            lead(k),
            lead(k),
            lead(log_decay),
            lead(np.ones(C)) if delta else None,
            jnp.asarray(SEGMENTS[None, None]) if packed else None,
            jnp.zeros((1, 1), jnp.int32) if packed else None,
        )
        operands = xla.channel_operands(chunks, SCALE)
        d_pair, d_q_in = lead(gradients.pair, R, C, C), lead(gradients.q_in, R, C, K)
        given = head_gates.StateGradients(*map(lead, gradients))._replace(pair=d_pair, q_in=d_q_in)
        expected = operands, operands, xla.channel_gradients(chunks, operands, given, SCALE)
    exact = StateGradients(*(None if x is None else jnp.asarray(x, jnp.float32) for x in gradients))
    actual = in_kernel(
        jnp.asarray(q, dtype), jnp.asarray(k, dtype), jnp.asarray(log_decay), exact, packed=packed, delta=delta
    )
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, wanted = np.asarray(got, np.float64), np.reshape(np.asarray(wanted), got.shape)
        assert np.max(np.abs(got - wanted)) < tolerance * max(np.max(np.abs(wanted)), 1e-30)
