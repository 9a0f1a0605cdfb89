"""AdamW with two parameter groups, the field's schedules, and the state a stage trains."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What changes from step to step. A pytree: checkpoint it whole and training resumes exactly."""

    step: jax.Array  # scalar int32: optimizer updates done
    params: Params  # float32 masters of what this stage trains
    optimizer: Any


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam's settings and the two learning-rate curves. Defaults are the papers' stage 2."""

    total_steps: int
    learning_rate: float = 7e-6  # embeddings, norms, MLPs, head
    mixer_learning_rate: float = 1e-4  # mixers, kept softmax layers and the norm before them
    final_learning_rate: float = 0.0  # at the last step of a cosine or linear schedule
    final_mixer_learning_rate: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices: see `decays`
    clip_norm: float | None = 1.0  # largest global gradient norm; None does not clip


def make_optimizer(config: OptimizerConfig, params: Params) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW per group. `params` gives the tree to label (values are not read)."""
    if config.total_steps < 1:
        raise ConfigError(f"total_steps={config.total_steps}: the token budget is smaller than one batch.")

    def adamw(peak: float, final: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(b1=config.betas[0], b2=config.betas[1], eps=config.eps),
            _decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule(config, peak, final)),
        )

    groups = {
        "mixer": adamw(config.mixer_learning_rate, config.final_mixer_learning_rate),
        "rest": adamw(config.learning_rate, config.final_learning_rate),
    }
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, optax.partition(groups, parameter_groups(params)))


def parameter_groups(params: Params) -> Params:
    """'mixer' for mixers and the norm that feeds them, 'rest' for everything else."""

    def group(path: tuple[Any, ...], _: Any) -> str:
        names = {str(getattr(key, "key", key)) for key in path}
        return "mixer" if names & {"mixers", "input_norm"} else "rest"

    return jax.tree_util.tree_map_with_path(group, params)


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay is for the parameter at `path`: projections, convolution taps, embedding and head.

    Norms, biases and what sets gates and decays (`A_log`, `dt_bias`) are pulled to no zero. A name says what a
    parameter is; its shape cannot, for a bias of heads has two axes as a matrix has.
    """
    name = str(getattr(path[-1], "key", path[-1]))
    return name in ("kernel", "taps", "embedding")


def _decayed_weights(rate: float) -> optax.GradientTransformation:
    """optax's `add_decayed_weights` for those that decay. No mask of optax's: it would change the state's tree, and
    checkpoints with it."""

    def add(updates: Params, params: Params | None) -> Params:
        if rate == 0.0:
            return updates
        return jax.tree_util.tree_map_with_path(
            lambda path, update, weight: update + rate * weight if decays(path) else update, updates, params
        )

    return optax.stateless(add)


def schedule(config: OptimizerConfig, peak: float, final: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, or cosine or linear to `final`."""
    warmup, total = config.warmup_steps, config.total_steps

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            value = final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * done))
        elif config.schedule == "linear":
            value = final + (peak - final) * (1.0 - done)
        else:
            value = jnp.float32(peak)
        return value * jnp.minimum(1.0, (step + 1) / warmup) if warmup else value

    return rate


def start(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state for `params`. Jit it with donated or sharded params: moments take the params' sharding."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def update(
    state: TrainState, gradients: Params, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """One optimizer update; returns the new state and the gradient's global norm before clipping."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, optimizer_state), optax.global_norm(gradients)
