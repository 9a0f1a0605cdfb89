"""AdamW with two groups of rates: the curves of both, which leaf is in which, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.train.optimizer import make_optimizer, parameter_groups, schedule, start, update
from jaxhybrid.weights.convert import convert
from tests.tiny import training

WARMUP, TOTAL = 4, 12
RATES = {  # by step: the first, the last of the warm-up, the peak, half way, a quarter to go, past the end
    "constant": {0: 0.25, 3: 1.0, 4: 1.0, 8: 1.0, 10: 1.0, 12: 1.0},
    "linear": {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.6, 10: 0.4, 12: 0.2, 13: 0.2},
    "cosine": {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.6, 10: 0.2 + 0.4 * (1 - 0.5**0.5), 12: 0.2, 13: 0.2},
}


@pytest.mark.parametrize("name", RATES)
def test_rates(name):
    """In units of the peak; the curve ends at a fifth of it."""
    config = training(TOTAL, schedule=name, warmup_steps=WARMUP)
    curve = schedule(config, 3e-4, 0.2 * 3e-4)
    for step, share in RATES[name].items():
        np.testing.assert_allclose(curve(step), share * 3e-4, rtol=1e-6, err_msg=f"step {step}")


def test_both_groups_follow_their_own_rates():
    """With a gradient of one everywhere, AdamW moves every leaf by its rate, at each step."""
    params = {"blocks": {"input_norm": jnp.zeros(2), "post_norm": jnp.zeros(2)}, "mixers": {"any": jnp.zeros(3)}}
    rates = {"learning_rate": 1e-3, "mixer_learning_rate": 5e-2}
    finals = {"final_learning_rate": 1e-4, "final_mixer_learning_rate": 1e-2}
    config = training(TOTAL, **rates, **finals, schedule="linear", warmup_steps=WARMUP, eps=1e-30, clip_norm=None)
    optimizer = make_optimizer(config, params)
    state = start(params, optimizer)
    step = jax.jit(lambda state: update(state, jax.tree.map(jnp.ones_like, state.params), optimizer)[0])
    expected = {"rest": 0.0, "mixer": 0.0}
    for number in range(TOTAL):
        state = step(state)
        for group, (peak, final) in {"rest": (1e-3, 1e-4), "mixer": (5e-2, 1e-2)}.items():
            fall = max(number - WARMUP, 0) / (TOTAL - WARMUP)
            expected[group] -= min(1, (number + 1) / WARMUP) * (peak - (peak - final) * fall)
        np.testing.assert_allclose(state.params["blocks"]["post_norm"], expected["rest"], rtol=1e-5)
        np.testing.assert_allclose(state.params["blocks"]["input_norm"], expected["mixer"], rtol=1e-5)
        np.testing.assert_allclose(state.params["mixers"]["any"], expected["mixer"], rtol=1e-5)


def test_every_leaf_has_its_group(teacher):
    mixer = GatedDeltaNetConfig(conv_size=2)
    types = (GatedDeltaNetConfig.kind, FULL_ATTENTION, GatedDeltaNetConfig.kind, GatedDeltaNetConfig.kind)
    shapes = jax.eval_shape(lambda: convert(teacher, types, mixer, jax.random.key(0)).params)
    groups = parameter_groups(shapes)
    blocks, mixers = groups.pop("blocks"), groups.pop("mixers")
    assert groups == {"embed": {"embedding": "rest"}, "head": {"kernel": "rest"}, "final_norm": {"scale": "rest"}}
    mlp = {name: {"kernel": "rest"} for name in ("gate_proj", "up_proj", "down_proj")}
    assert blocks == {"input_norm": {"scale": "mixer"}, "post_norm": {"scale": "rest"}, "mlp": mlp}
    assert set(mixers) == {FULL_ATTENTION, GatedDeltaNetConfig.kind}
    assert set(jax.tree.leaves(mixers)) == {"mixer"}


@pytest.mark.parametrize(("clip", "length"), [(None, 5.0), (2.5, 2.5), (7.0, 5.0)])
def test_clipping_is_by_the_norm_over_all_leaves(clip, length):
    """Seen through Adam's first moment: a tenth of the clipped gradient after one update with a decay of 0.9."""
    params = {"embed": jnp.zeros(1), "mixers": {"any": jnp.zeros(1)}}
    gradients = {"embed": jnp.array([3.0]), "mixers": {"any": jnp.array([4.0])}}
    optimizer = make_optimizer(training(TOTAL, clip_norm=clip), params)
    state, norm = update(start(params, optimizer), gradients, optimizer)
    assert norm == 5.0  # before clipping
    moments = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer) if ".mu" in jax.tree_util.keystr(path)
    ]
    assert sorted(float(m[0]) for m in moments) == pytest.approx([0.1 * 0.6 * length, 0.1 * 0.8 * length])
