"""The small modules that every part is made of, and what a block knows about its tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxhybrid_kernels.numerics import target_platform

from jaxhybrid.model import float8
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
    varying_alike,
)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
# Names for policies of recomputation.
MLP_INPUT, MLP_PRODUCT = "mlp_input", "mlp_product"


class LayerView(NamedTuple):
    """How one layer looks at the tokens, where layers differ in it; of all layers, arrays [L]."""

    slides: Any  # bool: it has the model's sliding window
    rotates: Any  # bool: it has rotary embedding


def layer_views(config: ModelConfig) -> list[LayerView] | list[None]:
    """Of each layer; None where all are alike."""
    if config.window is None and not config.unrotated_layers:
        return [None] * config.num_layers
    sliding = () if config.window is None else config.window.layers
    return [LayerView(i in sliding, i not in config.unrotated_layers) for i in range(config.num_layers)]


class TokenContext(NamedTuple):
    """What token mixers may ask about the tokens at hand."""

    # [B,T]; 0 is padding. A document is one run of equal ids, used once in a row; documents do not see each other.
    # None: the row is one document.
    segment_ids: jax.Array | None
    cos: jax.Array  # rotary tables: [B,T,K/2], or fewer pairs where a part of a head is rotated
    sin: jax.Array
    key_segment_ids: jax.Array | None = None  # [B,M] of the whole row, if it is split
    # When decoding, the place of this call's first token in the cache: a scalar for a chunk, [B] for one token a row.
    cache_index: jax.Array | None = None
    first_token: jax.Array | None = None  # scalar: the place in the row of this device's first token, if rows are split
    sliding_tables: tuple[jax.Array, jax.Array] | None = None  # cos and sin of sliding layers, if theirs are others
    slides: Any = None  # bool: the layer has the model's sliding window, if the model has one
    query_scale: jax.Array | None = None  # float32 [B,T]: of queries of softmax layers, by how much is before them

    def at_layer(self, view: LayerView | None) -> "TokenContext":
        """As the layer sees it that `view` is of."""
        if view is None:
            return self
        cos, sin = self.cos, self.sin
        if self.sliding_tables is not None:
            cos, sin = (jnp.where(view.slides, own, x) for own, x in zip(self.sliding_tables, (cos, sin)))
        cos, sin = jnp.where(view.rotates, cos, 1.0), jnp.where(view.rotates, sin, 0.0)
        return self._replace(cos=cos, sin=sin, slides=view.slides)


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
        kernel = self.kernel[...]
        if dtype == jnp.float32 and x.dtype == kernel.dtype == jnp.bfloat16 and self.equation == "...a,ab->...b":
            return self._complete(_wide_product(*varying_alike(x, kernel)))
        return self._complete(jnp.einsum(self.equation, x, kernel, preferred_element_type=dtype))

    def in_float8(self, x: float8.Scaled, dtype: Any) -> jax.Array:
        """x W + b in `dtype` for a kernel of two axes, with W rounded to float8 as x was."""
        return self._complete(float8.product(x, self.kernel[...], dtype).scaled(dtype))

    def _complete(self, y: jax.Array) -> jax.Array:
        if self.is_partial:  # a device has its own heads, or its share of the MLP
            y = total(y, "tensor")
        if self.bias is None:
            return y
        bias = self.bias[...]
        if bias.ndim == 1 or target_platform() != "gpu":
            return y + bias
        # A vector, as cuBLAS takes it: of any other XLA makes an array of y's size and adds that.
        return (y.reshape(*y.shape[: y.ndim - bias.ndim], -1) + bias.reshape(-1)).reshape(y.shape)


@jax.custom_vjp
def _wide_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [...,A] by kernel [A,B], both bfloat16, summed in float32 and left so.

    Its gradient would be products in float32, for which XLA widens all of x. Two bfloat16 parts of the gradient of the
    result have 16 bits together, more than float32 products have on GPUs and TPUs by default.
    """
    return jnp.einsum("...a,ab->...b", x, kernel, preferred_element_type=jnp.float32)


def _wide_product_backward(saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    high = d_y.astype(x.dtype)
    halves = jnp.concatenate([high, (d_y - high.astype(d_y.dtype)).astype(x.dtype)], axis=-1)
    d_kernel = jax.lax.dot(
        x.reshape(-1, x.shape[-1]).T, halves.reshape(-1, halves.shape[-1]), preferred_element_type=d_y.dtype
    )
    d_x = jnp.einsum("...b,ab->...a", halves, jnp.concatenate([kernel, kernel], axis=1))
    of_high, of_low = jnp.split(d_kernel, 2, axis=1)
    return d_x, (of_high + of_low).astype(kernel.dtype)


_wide_product.defvjp(lambda x, kernel: (_wide_product(x, kernel), (x, kernel)), _wide_product_backward)


class RMSNorm(nnx.Module):
    """x / rms(x) over the last axis, times the scale, or times 1 + the scale with `offset`."""

    def __init__(self, rngs: nnx.Rngs, width: int, axis: str, eps: float, offset: bool = False):
        self.scale = weight(rngs, (width,), (axis,), zeros if offset else ones)
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps, self.offset)


class WideRMSNorm(nnx.Module):
    """The norm of all heads [..,H,K] together, or of each by itself, with a scale for each channel of each."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int], heads_axis: str, eps: float, by_head: bool = False):
        self.scale = weight(rngs, shape, (heads_axis, "head_dim"), ones)
        self.eps, self.by_head = eps, by_head

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(exact_dtype(x.dtype))
        mean = jnp.mean(exact * exact, axis=-1 if self.by_head else (-2, -1), keepdims=True)
        if not self.by_head:  # each device has as many; where they are fewer than devices, all are copied as often
            mean = total(mean, "tensor") / axis_size("tensor")
        return (exact * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype) * self.scale[...].astype(x.dtype)


def query_key_norms(config: ModelConfig, rngs: nnx.Rngs, key_heads: int) -> Any:
    """(of queries, of keys) as the teacher has them."""
    H, K, eps = config.num_heads, config.head_dim, config.norm_eps
    if config.wide_qk_norm:
        return WideRMSNorm(rngs, (H, K), "heads", eps), WideRMSNorm(rngs, (key_heads, K), "kv_heads", eps)
    return tuple(RMSNorm(rngs, K, "head_dim", eps, config.norm_offset) for _ in range(2))


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
    """down(f(gate x) * up x): SwiGLU where f is silu, GeGLU where it is gelu."""

    # With `float8_mlp` operands are rounded to float8, scaled by token and by column of a kernel. Where a product's
    # inputs are split over `tensor`, each device scales its own part.

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(rngs, (D, F), ("embed", "mlp"), bias=bias)
        self.up_proj = Linear(rngs, (D, F), ("embed", "mlp"), bias=bias)
        self.down_proj = Linear(rngs, (F, D), ("mlp", "embed"), bias=bias)
        self.activation, self.is_float8 = config.activation, config.float8_mlp

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_float8:
            return self.down_proj.in_float8(self._hidden_in_float8(x), x.dtype)
        named = partial(checkpoint_name, name=MLP_PRODUCT)
        return self.down_proj(ACTIVATIONS[self.activation](named(self.gate_proj(x))) * named(self.up_proj(x)))

    def _hidden_in_float8(self, x: jax.Array) -> float8.Scaled:
        rows = float8.scaled(x, axis=-1)
        if self.activation == "silu" and self.gate_proj.bias is None:
            kernels = (part.kernel[...] for part in (self.gate_proj, self.up_proj))
            return float8.swiglu(*(float8.product(rows, kernel, x.dtype) for kernel in kernels))
        gate, up = (part.in_float8(rows, x.dtype) for part in (self.gate_proj, self.up_proj))
        return float8.scaled(ACTIVATIONS[self.activation](gate) * up, axis=-1)


class Mixture(nnx.Module):
    """A mixture of experts (arXiv 1701.06538): sum over a token's experts e of w_e down_e(f(gate_e x) * up_e x).

    The weights are the k largest of softmax(router x), divided by their sum with `normalise`. Tokens are sorted by
    expert and go through grouped products: an expert takes all that chose it, and none is dropped.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        self.gate = Linear(rngs, (config.hidden_size, config.experts.count), ("embed", None))  # the router, as in files
        self.experts = Experts(config, rngs)
        self.active, self.normalise = config.experts.active, config.experts.normalise

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens_ND = x.reshape(-1, x.shape[-1])
        scores_NE = jax.nn.softmax(self.gate(tokens_ND, dtype=exact_dtype(x.dtype)), axis=-1)
        # What is kept for the backward pass lies in this order: a choice made anew might differ where scores are close.
        chosen = checkpoint_name(jax.lax.top_k(scores_NE, self.active)[1], MLP_PRODUCT)
        weights = jnp.take_along_axis(scores_NE, chosen, axis=-1)
        if self.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=scores_NE.shape[-1])
        # A row for each choice, so that the gradient adds them up in float32 and not row by row.
        sorted_rows = _reordered(jnp.repeat(tokens_ND, self.active, axis=0), order)
        rows = _reordered(self.experts(sorted_rows, sizes), jnp.argsort(order))
        rows_NkD = rows.reshape(*chosen.shape, -1)
        mixed = jnp.sum(rows_NkD * weights[..., None].astype(x.dtype), axis=1)
        return total(mixed, "tensor").reshape(x.shape)


def _reordered(rows: jax.Array, order: jax.Array) -> jax.Array:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


class Experts(nnx.Module):
    """The MLPs of a mixture, stacked [E,...]; rows come sorted by expert, `sizes` [E] of them for each."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        E, D, F = config.experts.count, config.hidden_size, config.experts.width
        self.gate_proj = GroupedLinear(rngs, (E, D, F), ("experts", "embed", "mlp"))
        self.up_proj = GroupedLinear(rngs, (E, D, F), ("experts", "embed", "mlp"))
        self.down_proj = GroupedLinear(rngs, (E, F, D), ("experts", "mlp", "embed"))
        self.activation = config.activation

    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Of this device's part of F: the sum over `tensor` is left to the caller, who has fewer rows to sum."""
        named = partial(checkpoint_name, name=MLP_PRODUCT)
        gate, up = named(self.gate_proj(rows, sizes)), named(self.up_proj(rows, sizes))
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, sizes)


class GroupedLinear(nnx.Module):
    """A projection per expert, without bias."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int, int], axes: tuple[str, str, str]):
        self.kernel = weight(rngs, shape, axes, inputs=1)

    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, self.kernel[...], sizes)


class Block(nnx.Module):
    """One layer without its mixer: x + mixer(norm x), then + mlp(norm x), or with norms elsewhere."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        norm = partial(RMSNorm, rngs, config.hidden_size, "embed", config.norm_eps, config.norm_offset)
        self.residual_scale = config.residual_scale
        self.norms_before, self.norms_after = config.norms != "after", config.norms != "before"
        if self.norms_before:
            self.input_norm, self.post_norm = norm(), norm()
        self.mlp = MLP(config, rngs) if config.experts is None else Mixture(config, rngs)
        if self.norms_after:
            self.mixed_norm, self.mlp_norm = norm(), norm()

    def mixer_input(self, x: jax.Array) -> jax.Array:
        return self.input_norm(x) if self.norms_before else x

    def add_mixed(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        return self._added(x, self.mixed_norm(mixed) if self.norms_after else mixed)

    def add_mlp(self, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x, MLP_INPUT)
        with jax.named_scope("mlp"):
            out = self.mlp(self.post_norm(x) if self.norms_before else x)
            return self._added(x, self.mlp_norm(out) if self.norms_after else out)

    def _added(self, x: jax.Array, more: jax.Array) -> jax.Array:
        return x + (more if self.residual_scale == 1 else more * self.residual_scale)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: bool = False) -> jax.Array:
    """x / rms(x) over the last axis in float32, then cast back and scaled (as Llama does).

    offset: times 1 + scale in float32, and cast back after that (as Gemma does).
    """
    with jax.named_scope("norm"):
        exact = x.astype(exact_dtype(x.dtype))
        exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
        if offset:
            return (exact * (1.0 + scale.astype(exact.dtype))).astype(x.dtype)
        return exact.astype(x.dtype) * scale.astype(x.dtype)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """x, or cap * tanh(x / cap): numbers that stay below a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


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
