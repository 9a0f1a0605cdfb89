"""Teacher parameters -> student parameters: which layers turn linear, and what their mixers start from."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Params, initialize
from jaxhybrid.model.config import FULL_ATTENTION, MixerConfig, layers_of_kind
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.model.transformer import Model


def convert(teacher: Model, layer_types: tuple[str, ...], mixer: MixerConfig, rng: jax.Array) -> Model:
    """The student of `teacher` with one mixer name per layer. Pure and jittable (layer_types and mixer static).

    Embeddings, norms, MLPs and kept softmax layers are the teacher's. A linear mixer takes what its `from_attention`
    says; its gates and decays are new, by `mixer.gate_init` and `mixer.decay_init`.
    """
    source = teacher.config
    if any(kind != FULL_ATTENTION for kind in source.layer_types):
        raise ConfigError("convert needs a softmax teacher; this model already has linear layers.")
    mixer = mixer.resolve(source)
    config = replace(source, layer_types=tuple(layer_types), mixer=mixer)
    attention = teacher.params["mixers"][FULL_ATTENTION]
    mixers: Params = {}
    softmax, linear = (layers_of_kind(config.layer_types, kind) for kind in (FULL_ATTENTION, mixer.kind))
    if softmax:
        mixers[FULL_ATTENTION] = _take_rows(attention, softmax)
    if linear:
        linear_mixer = STUDENT_MIXERS[mixer.kind]
        depths = jnp.array(linear, jnp.float32) / max(config.num_layers - 1, 1)
        fresh = initialize(linear_mixer, config, rng, len(linear)) | linear_mixer.by_depth(depths, config)
        mixers[mixer.kind] = fresh | linear_mixer.from_attention(_take_rows(attention, linear), config)
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
