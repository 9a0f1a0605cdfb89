"""How the arguments lie in memory for the kernels, and back.

q [B,T,Hq*K], k [B,T,Hk*K], v [B,T,N*V]: heads lie in lanes, so that no array is transposed in memory. A grid step takes
CHUNK tokens of `heads` value heads. Small gates are prepared here, outside the kernels, and lie with tokens in lanes:
[B,N/heads,n,rows,C] float32, one row per gate and head (see gates.py).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxhybrid_kernels.chunk_layout import Inputs
from jaxhybrid_kernels.numerics import compute_dtype, target_platform
from jaxhybrid_kernels.validation import Sizes

CHUNK = 128
WIDTHS = (64, 128, 256)
MOST_HEADS = 16  # of 128 channels in bfloat16, a query each, per grid step: independent chains that hide latencies
MOST_HEADS_TPU7X = 2  # its compiler takes many minutes for more
# Times the size of an element, for one head of 128 channels in a packed backward with norms: with a decay per channel,
# mostly spilled registers, and without.
CHANNEL_VMEM = 4 * 2**20
HEAD_VMEM = 15 * 2**16


class Layout(NamedTuple):
    """Everything static about one call."""

    sizes: Sizes  # as given
    K: int  # key width in the kernel: 64, 128 or 256, zero channels added
    V: int
    heads: int  # value heads per grid step
    chunks: int
    scale: float
    dtype: Any  # of q, k, v and of the operands of the large products
    delta: bool
    decay: str | None  # None, "head" or "channel"
    segments: bool
    norm_eps: float | None  # of the L2 norms that q and k are to be divided by, None: none; delta rule only

    @property
    def steps(self) -> int:
        """Head groups."""
        return self.sizes.N // self.heads

    @property
    def exact(self) -> bool:
        return self.dtype == jnp.float32

    def block_heads(self, heads: int) -> int:
        """Of an array with that many heads, how many a grid step reads."""
        return max(self.heads * heads // self.sizes.N, 1)

    @property
    def q_heads(self) -> int:
        return self.block_heads(self.sizes.Hq)

    @property
    def k_heads(self) -> int:
        return self.block_heads(self.sizes.Hk)

    @property
    def queries(self) -> int:
        """Queries per state."""
        return self.sizes.queries_per_state

    def copies(self, heads: int) -> int:
        """How many head groups share each head of an array with that many heads."""
        return self.steps * self.block_heads(heads) // heads

    def query_heads_of(self, head: int) -> list[int]:
        """The query heads in the block that read the state of a value head in the block."""
        if self.sizes.Hq >= self.sizes.N:
            return [head * self.queries + r for r in range(self.queries)]
        return [head * self.q_heads // self.heads]

    def key_head_of(self, head: int) -> int:
        return head * self.k_heads // self.heads


def make_layout(inputs: Inputs, scale: float, sizes: Sizes, norm_eps: float | None = None) -> Layout:
    K, V = padded_width(sizes.K), padded_width(sizes.V)
    decay = None
    dtype = jnp.dtype(compute_dtype(inputs.q, inputs.k, inputs.v))
    most = MOST_HEADS * 2 // (dtype.itemsize * sizes.queries_per_state)
    vmem = MOST_HEADS
    if inputs.log_decay is not None:
        decay = "head" if inputs.log_decay.ndim == 3 else "channel"
    if target_platform() == "tpu":
        chip = pltpu.get_tpu_info()
        if chip.generation >= 7:
            most = min(most, MOST_HEADS_TPU7X)
        vmem = chip.vmem_capacity_bytes // ((CHANNEL_VMEM if decay == "channel" else HEAD_VMEM) * dtype.itemsize)
    heads = _heads_per_step(sizes, K, V, most, vmem)
    if heads is None:
        K, V = max(K, 128), max(V, 128)
        heads = _heads_per_step(sizes, K, V, most, vmem)
    assert heads is not None  # one head is always possible at full lanes
    return Layout(
        sizes,
        K,
        V,
        heads,
        -(-sizes.T // CHUNK),
        scale,
        dtype,
        inputs.beta is not None,
        decay,
        inputs.segment_ids is not None,
        norm_eps,
    )


def padded_width(width: int) -> int:
    """The kernel's width for this many channels; the argument checks refuse more than the last of WIDTHS."""
    return next(w for w in WIDTHS if w >= width)


def _heads_per_step(sizes: Sizes, K: int, V: int, most: int, vmem: int) -> int | None:
    """The largest divisor of N, up to `most` of 128 channels, whose blocks are whole lanes and share no head partly.

    vmem: for how many heads of 128 channels there is memory; half of what a head takes grows with K V, half with K + V.
    """
    wide_K, wide_V = max(K, 128), max(V, 128)
    room = vmem * 4 * 128**2 // (2 * wide_K * wide_V + 128 * (wide_K + wide_V))
    for heads in range(max(min(most * 128 // max(wide_K, wide_V), room), 1), 0, -1):
        fits = sizes.N % heads == 0
        for count, width in ((sizes.Hq, K), (sizes.Hk, K), (sizes.N, V), (sizes.out_heads, V)):
            share = -(-sizes.N // count)
            block = max(heads * count // sizes.N, 1)
            fits &= heads % share == 0 or share % heads == 0
            fits &= block * width % 128 == 0 or block == count
        if fits:
            return heads
    return None


def lay_out(x: jax.Array, segment_ids: jax.Array | None, width: int, dtype: Any) -> jax.Array:
    """[B,T,H,w] -> [B,n*C,H*width]: padding tokens zeroed, T and w padded with zeros."""
    B, T, H, w = x.shape
    x = x.astype(dtype)
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0)[:, :, None, None], x, 0)
    x = jnp.pad(x, ((0, 0), (0, -T % CHUNK), (0, 0), (0, width - w)))
    return x.reshape(B, -1, H * width)


def take_back(x: jax.Array, like: jax.Array, segment_ids: jax.Array | None, width: int) -> jax.Array:
    """Undoes `lay_out` for the gradient of `like` [B,T,H,w]: a head's copies are summed, padding tokens get zero."""
    _, T, H, w = like.shape
    x = x.reshape(*x.shape[:2], H, -1, width)[:, :T, :, :, :w]
    x = x[:, :, :, 0] if x.shape[3] == 1 else x.sum(axis=3)
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0)[:, :, None, None], x, 0)
    return x.astype(like.dtype)


def lay_out_state(state: jax.Array, layout: Layout) -> jax.Array:
    """[B,N,K,V] with zero channels added."""
    sizes = layout.sizes
    return jnp.pad(state, ((0, 0), (0, 0), (0, layout.K - sizes.K), (0, layout.V - sizes.V)))


def take_back_state(state: jax.Array, layout: Layout) -> jax.Array:
    return state[:, :, : layout.sizes.K, : layout.sizes.V]
