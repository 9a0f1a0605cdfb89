"""AdamW or Adafactor with two parameter groups, the field's schedules, and the state a stage trains."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.partition import lying_as, may_offload, near
from jaxhybrid.settings.stages import StageConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What changes from step to step. A pytree: checkpoint it whole and training resumes exactly."""

    step: jax.Array  # scalar int32: optimizer updates done
    params: Params  # float32 masters of what this stage trains
    optimizer: Any


def make_optimizer(stage: StageConfig, params: Params) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Adafactor per group, as the stage's settings have it.

    Args:
        params: the tree whose leaves are put into groups; values are not read.
    """

    def of_group(peak: float, final: float) -> optax.GradientTransformation:
        return optax.chain(
            _scale_by_moments(stage),
            _decayed_weights(stage.weight_decay),
            optax.scale_by_learning_rate(schedule(stage, peak, final)),
        )

    groups = {name: of_group(*rates) for name, rates in stage.rates.items()}
    clip = optax.identity() if stage.clip_norm is None else optax.clip_by_global_norm(stage.clip_norm)
    optimizer = optax.chain(clip, optax.partition(groups, parameter_groups(params)))
    return _offloaded(optimizer) if "moments" in stage.offload else optimizer


def _scale_by_moments(stage: StageConfig) -> optax.GradientTransformation:
    if stage.optimizer == "adafactor":
        # Heads are an axis of their own, so that a head's width is the smaller side of a projection.
        return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=64), optax.clip_by_block_rms(1.0))
    return optax.scale_by_adam(
        b1=stage.betas[0], b2=stage.betas[1], eps=stage.eps, mu_dtype=jnp.dtype(stage.moment_dtype)
    )


def _offloaded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with its state in the host's memory; it comes to the devices while an update is made. For jit."""

    def init(params: Params) -> Any:
        return _to_host(optimizer.init(params), lambda x: x.ndim > 0)  # counts stay

    def update(gradients: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, after = optimizer.update(gradients, near(state), params)
        return updates, lying_as(after, state)

    return optax.GradientTransformation(init, update)


def _to_host(tree: Any, goes: Callable[[jax.Array], bool]) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if goes(x) else x, tree)


def parameter_groups(params: Params) -> Params:
    """'mixer' for mixers and the norm that feeds them, 'rest' for everything else."""

    def group(path: tuple[Any, ...], _: Any) -> str:
        names = {str(getattr(key, "key", key)) for key in path}
        return "mixer" if names & {"mixers", "input_norm", "mixed_norm"} else "rest"

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


def schedule(stage: StageConfig, peak: float, final: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, or cosine or linear to `final` at the stage's last step."""
    warmup = stage.warmup_steps

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / (stage.steps - warmup), 0.0, 1.0)
        if stage.schedule == "cosine":
            value = final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * done))
        elif stage.schedule == "linear":
            value = final + (peak - final) * (1.0 - done)
        else:
            value = jnp.float32(peak)
        return value * jnp.minimum(1.0, (step + 1) / warmup) if warmup else value

    return rate


def start(params: Params, optimizer: optax.GradientTransformation, *, offload: Sequence[str] = ()) -> TrainState:
    """A fresh state for `params`. Jit it with donated or sharded params: moments take the params' sharding.

    offload: a stage's; with `masters` in it the layers' matrices lie in the host's memory.
    """
    moments = optimizer.init(params)
    params = _to_host(params, may_offload) if "masters" in offload else params
    return TrainState(jnp.zeros((), jnp.int32), params, moments)


def update(
    state: TrainState, gradients: Params, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """One optimizer update; returns the new state and the gradient's global norm before clipping."""
    with jax.named_scope("optimizer"):
        masters = near(state.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, masters)
        params = lying_as(optax.apply_updates(masters, updates), state.params)
    return TrainState(state.step + 1, params, optimizer_state), optax.global_norm(gradients)
