"""Where alignment begins: values of the linear mixers measured on the teacher, in place of drawn ones.

After Taylor-Calibrate (arXiv 2606.16429), whose four parts these are, each found otherwise where noted:

    decay      a state's half-life: that whose context lies nearest the teacher's, or its heads' mean attention distance
    strength   the write strength whose context lies nearest the teacher's
    gate       the output gate is open: a head's context passes as it is
    scale      each head's rows of o_proj are multiplied by its least squares factor to the teacher's context

A head's context is what goes into o_proj; nearest is that which, scaled by its least squares factor, leaves least of
the teacher's. There half-lives were attention distances, the strength was taken from the attention's entropy, the gate
was a small copy of v_proj, and the scale multiplied v_proj, which a norm of the context undoes. Projections without a
bias get a constant from the mean m of the layer's input x: m / |m|^2 times x is 1 on average.

One walk over the teacher measures everything on one batch; what it gives is small, and `with_calibration` puts it into
the parameters.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.attention import Attention
from jaxhybrid.model.blueprint import Params, bind, variables
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.partition import (
    BATCH_AXES,
    SHARDS,
    active_specs,
    axis_index,
    axis_size,
    batch_spec,
    gather,
    on_shards,
    own_heads,
    shards,
    splits_tokens,
    total,
)
from jaxhybrid.model.reach import attention_distance
from jaxhybrid.model.transformer import Model, embed, token_context
from jaxhybrid.model.walk import walk
from jaxhybrid.stages.batch import Batch, count_tokens, token_mask

SHORTEST_LIFE = 0.5  # tokens: of a head that reads its own token
STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)  # that are tried
HALF_LIVES = (1, 4, 16, 64, 256, 1024, 4096)
LEAST_SCALE, GREATEST_SCALE = 0.1, 10.0

# Of every layer: "constant" [L,D], and of the parts asked for "half_lives" [L,N] in tokens, "strengths" [L,N],
# "scales" [L,H], float32, the same on all devices.
Calibration = dict[str, jax.Array]


def calibration(
    mixers: Params,
    teacher: Model,
    batch: Batch,
    *,
    config: ModelConfig,
    parts: tuple[str, ...],
    fits_decay: bool = True,
    dtype: Any = jnp.bfloat16,
) -> Calibration:
    """What `batch` says of an all-linear student's mixers. Padding says nothing.

    Args:
        mixers: {kind: stack}, as `convert` makes them.
        config: the student's.
        parts: of `LinearMixer.takes`.
        fits_decay: half-lives are the nearest of `HALF_LIVES`; False: the heads' attention distances.
    """
    ((kind, stack),) = mixers.items()
    assert set(config.layer_types) == {kind}, "calibration is of all-linear students"
    spec = batch_spec(batch["tokens"])
    own_specs = active_specs(variables(LINEAR_MIXERS[kind], config, config.num_layers))
    run = partial(_measured, teacher.config, config, parts, fits_decay, dtype, splits_tokens(spec))
    arguments = teacher.params, stack, batch["tokens"], batch["segment_ids"], count_tokens(batch)
    return on_shards(run, arguments, (teacher.specs, own_specs, spec, spec, P()), P())


def with_calibration(mixers: Params, values: Calibration, config: ModelConfig, parts: tuple[str, ...]) -> Params:
    """The mixers with these values in place of their own. Pure and jittable."""
    ((kind, stack),) = mixers.items()
    specs = active_specs(variables(LINEAR_MIXERS[kind], config, config.num_layers))

    def on_own(stack: Params, values: Calibration) -> Params:
        states, column = config.num_states, config.hidden_size // shards()
        # K/V heads fewer than the devices of `tensor` are not split.
        states = states // axis_size("tensor") if states % axis_size("tensor") == 0 else states
        constant = jax.lax.dynamic_slice_in_dim(values["constant"], axis_index(*SHARDS) * column, column, 1)
        put = partial(_with_values, config=config, parts=parts, states=states)
        return jax.vmap(put)(stack, values | {"constant": constant})

    return {kind: on_shards(on_own, (stack, values), (specs, P()), specs)}


def _with_values(own: Params, values: Calibration, config: ModelConfig, parts: tuple[str, ...], states: int) -> Params:
    """One layer's parameters, of which this device has so many states, with the parts that are measured already."""
    assert config.mixer is not None
    mixer, constant = LINEAR_MIXERS[config.mixer.kind], values["constant"]
    if "half_lives" in values:
        own = mixer.with_half_lives(own, _own_part(values["half_lives"], states))
    if "strengths" in values:
        own = mixer.with_strengths(own, _own_part(values["strengths"], states), constant)
    if "gate" in parts:
        own = mixer.with_open_gate(own, constant, config)
    if "scales" in values:
        kernel = own["o_proj"]["kernel"]
        scales = _own_part(values["scales"], len(kernel))[:, None, None]
        own = own | {"o_proj": own["o_proj"] | {"kernel": kernel * scales.astype(kernel.dtype)}}
    return own


def _own_part(x: jax.Array, size: int) -> jax.Array:
    """Of all heads or states, the `size` that this device has."""
    first = axis_index("tensor") * x.shape[0] // axis_size("tensor") if size < x.shape[0] else 0
    return jax.lax.dynamic_slice_in_dim(x, first, size)


def _measured(
    teacher_config: ModelConfig,
    config: ModelConfig,
    parts: tuple[str, ...],
    fits_decay: bool,
    dtype: Any,
    is_split: bool,
    params: Params,
    stack: Params,
    tokens_BT: jax.Array,
    segment_ids: jax.Array,
    tokens: jax.Array,
) -> Calibration:
    """`calibration` on this device's tokens and heads; `tokens` are those of the batch."""
    assert config.mixer is not None
    linear, mask = LINEAR_MIXERS[config.mixer.kind], token_mask(segment_ids)

    def mix(normed: jax.Array, attention: Any, context: TokenContext, own: Params) -> tuple[jax.Array, Any]:
        o_proj, attention.o_proj = attention.o_proj, Unprojected()
        teacher_context = attention(normed, context)[0]
        mean = total(jnp.einsum("btd,bt->d", normed, mask, preferred_element_type=jnp.float32), *BATCH_AXES) / tokens
        values = {"constant": mean / jnp.sum(mean * mean)}
        if "decay" in parts:
            distances = _of_all_heads(_distances(attention, normed, context) * mask[..., None]) / tokens
            values["half_lives"] = jnp.maximum(_of_states(distances), SHORTEST_LIFE)
        whole = gather(variables(linear, config), own, dtype)
        states = own_heads(config.num_states)

        def products(values: Calibration) -> tuple[jax.Array, jax.Array]:
            """(<teacher's context, mixer's>, <mixer's, mixer's>) [H] over all tokens, with these values."""
            mixer: Any = bind(linear, config, _with_values(whole, values, config, parts, states))
            mixer.o_proj = Unprojected()
            ours = mixer(normed, context)[0]
            pairs = (jnp.einsum("bthk,bthk,bt->bth", x, ours, mask) for x in (teacher_context, ours))
            crossed, own = (_of_all_heads(pair.astype(jnp.float32)) for pair in pairs)
            return crossed, own

        def nearest(name: str, tried: tuple[float, ...]) -> jax.Array:
            """[N]: of the tried values of each state, the one with which most of the teacher's context is explained."""

            def explained(value: jax.Array) -> jax.Array:
                crossed, own = products(values | {name: jnp.broadcast_to(value, config.num_states)})
                return _of_states(crossed * crossed / jnp.maximum(own, 1e-30))

            every = jnp.array(tried, jnp.float32)
            return every[jnp.argmax(jax.lax.map(explained, every), axis=0)]

        if "strength" in parts:
            values["strengths"] = nearest("strengths", STRENGTHS)
        if "decay" in parts and fits_decay:
            values["half_lives"] = nearest("half_lives", HALF_LIVES)
            if "strength" in parts:  # those before were beside other half-lives
                values["strengths"] = nearest("strengths", STRENGTHS)
        if "scale" in parts:
            crossed, length = products(values)
            values["scales"] = jnp.clip(crossed / jnp.maximum(length, 1e-30), LEAST_SCALE, GREATEST_SCALE)
        return o_proj(teacher_context), values

    def _of_all_heads(x_BTH: jax.Array) -> jax.Array:
        """Summed over all tokens: [H] of all heads, those of other devices too."""
        sums, heads = jnp.sum(x_BTH, axis=(0, 1)), config.num_heads
        own = jax.lax.dynamic_update_slice_in_dim(
            jnp.zeros(heads, sums.dtype), sums, axis_index("tensor") * len(sums), 0
        )
        return total(own, *BATCH_AXES, "tensor")

    def _of_states(x_H: jax.Array) -> jax.Array:
        """Mean over the query heads that read a state: [N]."""
        return jnp.mean(x_H.reshape(config.num_states, -1), axis=1)

    context = token_context(teacher_config, tokens_BT, segment_ids, None, is_split)
    x = embed(Model(params, teacher_config), tokens_BT, dtype)
    _, found = walk(params, teacher_config, x, context, mix, extra={FULL_ATTENTION: stack})
    return found[FULL_ATTENTION]


class Unprojected(nnx.Module):
    """In the place of an o_proj: the mixer's output is its context [B,T,H,K]."""

    def __call__(self, context_BTHK: jax.Array) -> jax.Array:
        return context_BTHK


def _distances(attention: Attention, normed: jax.Array, context: TokenContext) -> jax.Array:
    """[B,T,H] of the attention that `Attention.__call__` computes."""
    return attention.over_row(*attention.projected(normed, context), context, attend=attention_distance)
