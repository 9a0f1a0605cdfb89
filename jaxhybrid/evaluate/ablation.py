"""A hybrid with one kind of its layers off: which of them does the work.

Hybrids can come to leave all to their softmax layers and ignore the linear ones (arXiv 2510.05901); figures of the
whole do not show it.
"""

import jax
import jax.numpy as jnp

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.transformer import Model


def ablated(model: Model, softmax: bool) -> Model:
    """The model with the mixers of its softmax layers (or of its linear ones) saying nothing: their output projections
    are zero, so that those layers are their MLPs alone."""
    mixers = {
        kind: stack | {"o_proj": jax.tree.map(jnp.zeros_like, stack["o_proj"])}
        if (kind == FULL_ATTENTION) == softmax
        else stack
        for kind, stack in model.params["mixers"].items()
    }
    return Model(model.params | {"mixers": mixers}, model.config, model.folder)


def ablations(name: str, model: Model) -> dict[str, Model]:
    """Both, by the name of their rows; none of a model that has one kind of layers only."""
    if len(set(model.config.layer_types)) < 2:
        return {}
    return {f"{name}, linear off": ablated(model, False), f"{name}, softmax off": ablated(model, True)}
