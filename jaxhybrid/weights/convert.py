"""Teacher parameters -> student parameters: which layers turn linear, and what their mixers start from."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET, GatedDeltaNetConfig, ModelConfig, layers_of_kind
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.params import Params, initialize
from jaxhybrid.model.transformer import Model, stack


def resolve_mixer(config: ModelConfig, mixer: GatedDeltaNetConfig) -> GatedDeltaNetConfig:
    """The mixer's settings with every "as the teacher has it" filled in; says what a choice leaves behind."""
    for name, carried, present in (
        ("qkv_bias", mixer.qkv_bias, config.qkv_bias),
        ("qk_norm", mixer.qk_norm, config.qk_norm),
    ):
        if present and carried is False:
            warnings.warn(
                f"mixer.{name}=False: the teacher's {name} is not carried into the linear layers.", stacklevel=3
            )
        if carried and not present:
            raise ConfigError(f"mixer.{name}=True, but the teacher has no {name} to carry; leave it unset.")
    if mixer.conv_size < 0 or mixer.conv_size == 1:
        raise ConfigError(f"mixer.conv_size={mixer.conv_size}: use 0 for no convolution, or at least 2 taps.")
    return replace(mixer, qkv_bias=config.qkv_bias if mixer.qkv_bias is None else mixer.qkv_bias,
                   qk_norm=config.qk_norm if mixer.qk_norm is None else mixer.qk_norm)  # fmt: skip


def convert(teacher: Model, layer_types: tuple[str, ...], mixer: GatedDeltaNetConfig, rng: jax.Array) -> Model:
    """The student of `teacher` with one mixer name per layer. Pure and jittable (layer_types and mixer static).

    Embeddings, norms, MLPs and kept softmax layers are the teacher's. A linear mixer takes the teacher's q, k, v and o
    projections; grouped K/V heads are cloned whole, head by head, for the query heads that read them (or kept as they
    are with `mixer.expand_kv=False`). Gates and decays are new, by `mixer.gate_init` and `mixer.decay_init`.
    """
    source = teacher.config
    if any(kind != FULL_ATTENTION for kind in source.layer_types):
        raise ConfigError("convert needs a softmax teacher; this model already has linear layers.")
    mixer = resolve_mixer(source, mixer)
    config = replace(source, layer_types=tuple(layer_types), gated_deltanet=mixer)
    attention = teacher.params["mixers"][FULL_ATTENTION]
    mixers: Params = {}
    softmax, linear = (layers_of_kind(config.layer_types, kind) for kind in (FULL_ATTENTION, GATED_DELTANET))
    if softmax:
        mixers[FULL_ATTENTION] = _take_rows(attention, softmax)
    if linear:
        kept = _take_rows(attention, linear)
        fresh = initialize(stack(MIXERS[GATED_DELTANET].declare(config), len(linear)), rng)
        mixers[GATED_DELTANET] = fresh | transferred_mixer(kept, config)
    return Model({**teacher.params, "mixers": mixers}, config, teacher.folder)


def with_softmax_layers(linear: Model, teacher: Model, layer_types: tuple[str, ...]) -> Model:
    """The all-linear student with the teacher's attention put back in the layers that `layer_types` has as softmax.

    Only mixers are copied; the rest of the parameters are the student's own arrays.
    """
    (linear_kind,) = set(linear.config.layer_types)
    sources = {FULL_ATTENTION: teacher, linear_kind: linear}
    mixers = {
        kind: _take_rows(source.params["mixers"][kind], layers_of_kind(layer_types, kind))
        for kind, source in sources.items()
        if kind in layer_types
    }
    return Model({**linear.params, "mixers": mixers}, linear.config.with_layers(layer_types), linear.folder)


@partial(jax.jit, static_argnums=1)
def _take_rows(stacked: Params, rows: tuple[int, ...]) -> Params:
    # Row by row: indexing with an array would ask where the result of a sharded operand should lie.
    return jax.tree.map(lambda w: jnp.stack([w[row] for row in rows]), stacked)


def transferred_mixer(attention: Params, config: ModelConfig) -> Params:
    """The part of stacked linear mixers that comes from stacked attention layers."""
    mixer = config.gated_deltanet
    assert mixer is not None
    repeats = config.num_heads // config.num_kv_heads if mixer.expand_kv else 1

    def expand(w: jax.Array, axis: int) -> jax.Array:
        return jnp.repeat(w, repeats, axis=axis)  # whole heads: query head i reads K/V head i // repeats

    carried = {
        "q_proj": attention["q_proj"],
        "k_proj": expand(attention["k_proj"], 2),
        "v_proj": expand(attention["v_proj"], 2),
        "o_proj": attention["o_proj"],
    }
    if mixer.qkv_bias:
        carried["q_bias"] = attention["q_bias"]
        carried |= {name: expand(attention[name], 1) for name in ("k_bias", "v_bias")}
    if config.o_bias:
        carried["o_bias"] = attention["o_bias"]
    if mixer.qk_norm:
        carried |= {name: attention[name] for name in ("q_norm", "k_norm")}
    if mixer.output_gate and mixer.gate_init == "value":
        carried["g_proj"] = jnp.repeat(attention["v_proj"], config.num_heads // config.num_kv_heads, axis=2)
    return carried
