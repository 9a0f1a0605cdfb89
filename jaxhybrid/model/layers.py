"""The small modules that every part is made of, and what a block knows about its tokens."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxhybrid.model.blueprint import Initializer, normal, ones, weight, zeros
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import (
    SHARDS,
    axis_index,
    axis_size,
    differing,
    exchanged,
    joined,
    total,
)

# Names for policies of recomputation.
MLP_INPUT, MLP_PRODUCT = "mlp_input", "mlp_product"


class TokenContext(NamedTuple):
    """What token mixers may ask about the tokens at hand."""

    # [B,T]; 0 is padding. A document is one run of equal ids, used once in a row; documents do not see each other.
    # None: the row is one document.
    segment_ids: jax.Array | None
    cos: jax.Array  # [B,T,K/2] rotary tables
    sin: jax.Array
    key_segment_ids: jax.Array | None = None  # [B,M] of the whole row, if it is split
    # When decoding, the place of this call's first token in the cache: a scalar for a chunk, [B] for one token a row.
    cache_index: jax.Array | None = None
    first_token: jax.Array | None = None  # scalar: the place in the row of this device's first token, if rows are split


class Linear(nnx.Module):
    """A projection from the first `inputs` axes of its kernel to the others, with its bias.

    One weight a module: that is what tools for quantisation and LoRA look for.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool | None = False,
        inputs: int = 1,
        init: Initializer = normal,
        bias_init: Initializer = zeros,
        bias_kind: type[nnx.Param] = nnx.Param,
    ):
        self.kernel = weight(rngs, shape, axes, init, inputs=inputs)
        self.bias = weight(rngs, shape[inputs:], axes[inputs:], bias_init, bias_kind) if bias else None
        names = "abcd"[: len(shape)]
        self.equation = f"...{names[:inputs]},{names}->...{names[inputs:]}"
        self.is_partial = bool({"heads", "mlp"} & set(axes[:inputs]))

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """x W + b; summed in `dtype` where that is given."""
        y = jnp.einsum(self.equation, x, self.kernel[...], preferred_element_type=dtype)
        if self.is_partial:  # a device has its own heads, or its share of the MLP
            y = total(y, "tensor")
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int, axis: str, eps: float):
        self.scale = weight(rngs, (width,), (axis,), ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class Embedding(nnx.Module):
    """The table [S,D] of token vectors."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int]):
        self.embedding = weight(rngs, shape, ("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return look_up(self.embedding[...], tokens, self.embedding.shape[0], self.embedding[...].dtype)


def look_up(table: jax.Array, tokens_BT: jax.Array, vocab_size: int, dtype: Any) -> jax.Array:
    """Rows of this device's part of a table [S,D], for its tokens: [B,T,D] in `dtype`.

    No device has the table whole: each looks up its channels for the tokens of all that share the table, and hands
    them over. Of a vocabulary split over `tensor` one device has the row, the others zeros.
    """
    tokens, is_split = joined(tokens_BT.reshape(-1), 0, *SHARDS), vocab_size % axis_size("tensor") == 0
    table = differing(table, "data")
    if table.shape[0] == vocab_size:
        rows = table[tokens].astype(dtype)
    else:
        own = tokens - axis_index("tensor") * table.shape[0]
        is_here = (own >= 0) & (own < table.shape[0])
        rows = jnp.where(is_here[:, None], table[jnp.where(is_here, own, 0)].astype(dtype), 0)
    rows = exchanged(rows, split=0, join=1)
    if is_split:
        rows = total(rows, "tensor")
    return rows.reshape(*tokens_BT.shape, -1)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(rngs, (D, F), ("embed", "mlp"), bias=bias)
        self.up_proj = Linear(rngs, (D, F), ("embed", "mlp"), bias=bias)
        self.down_proj = Linear(rngs, (F, D), ("mlp", "embed"), bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        named = partial(checkpoint_name, name=MLP_PRODUCT)
        return self.down_proj(jax.nn.silu(named(self.gate_proj(x))) * named(self.up_proj(x)))


class Block(nnx.Module):
    """One pre-norm layer without its mixer: x + mixer(norm x), then + mlp(norm x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(rngs, config.hidden_size, "embed", config.norm_eps)
        self.post_norm = RMSNorm(rngs, config.hidden_size, "embed", config.norm_eps)
        self.mlp = MLP(config, rngs)

    def add_mlp(self, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x, MLP_INPUT)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.post_norm(x))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis in float32, then cast back and scaled (as Llama does)."""
    with jax.named_scope("norm"):
        exact = x.astype(exact_dtype(x.dtype))
        exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
        return exact.astype(x.dtype) * scale.astype(x.dtype)


def exact_dtype(dtype: Any) -> Any:
    """Dtype of norms, rotations, softmax and logits: float32, or float64 where the model runs in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def segment_starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Where the run of equal ids began that each token is in, [B,T] int32."""
    index = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def segment_positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Position of each token inside its own segment, [B,T] int32, starting at 0."""
    return jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32) - segment_starts(segment_ids_BT)
