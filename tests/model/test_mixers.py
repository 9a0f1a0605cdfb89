"""Every registered linear mixer by itself: against its recurrence written out, and against itself, chunked and not."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.blueprint import bind, is_variable, variables
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.layers import TokenContext, segment_positions
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.mixers.deltanet import DeltaNetConfig
from jaxhybrid.model.mixers.fixed_decay import FixedDecayConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.kimi_delta import KimiDeltaConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.mixers.rwkv7 import RWKV7Config
from jaxhybrid.model.rope import rotary_tables
from tests.layers import layer_output

EPS = 1e-5
CARRIED = {"qkv_bias": True, "qk_norm": True}
MIXERS = {
    "gated_deltanet": GatedDeltaNetConfig(conv_size=3, expand_kv=False, **CARRIED),
    "gla": GLAConfig(decay_rank=4, **CARRIED),
    "deltanet": DeltaNetConfig(conv_size=3, expand_kv=False, **CARRIED),
    "kimi_delta": KimiDeltaConfig(low_rank=4, conv_size=3, **CARRIED),
    "lightning": FixedDecayConfig(**CARRIED),
    "retnet": FixedDecayConfig(form="retnet", expand_kv=False, **CARRIED),
    "mamba2": Mamba2Config(ssm_conv_size=3, expand_kv=False, **CARRIED),
    "rwkv6": RWKV6Config(low_rank=4, expand_kv=False, **CARRIED),
    "rwkv7": RWKV7Config(low_rank=4, **CARRIED),
}


def test_every_mixer_is_here():
    assert {mixer.kind for mixer in MIXERS.values()} == set(LINEAR_MIXERS)


@dataclass(frozen=True)
class Layer:
    config: ModelConfig
    params: dict

    def __call__(self, params, x, segments, state=None):
        tables = rotary_tables(self.config, segment_positions(segments))
        context = TokenContext(segments, *tables)
        return bind(LINEAR_MIXERS[self.config.mixer.kind], self.config, params)(x, context, state)

    @property
    def empty(self):
        return LINEAR_MIXERS[self.config.mixer.kind].initial_state(self.config, 1, 0, jnp.float32)


@pytest.fixture(scope="module", params=MIXERS)
def layer(request):
    """One layer with nothing at a start that would hide it."""
    mixer = MIXERS[request.param]
    config = ModelConfig(
        family="llama", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=8, norm_eps=EPS, max_position_embeddings=64, layer_types=(mixer.kind,), mixer=mixer,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def draw(path, variable):
        noise = rng.standard_normal(variable.shape)
        names = {"scale": 1 + 0.3 * noise, "A_log": 0.5 * noise, "dt_bias": noise - 2, "decay_bias": noise - 2}
        return jnp.asarray(names.get(path[-1].key, 0.4 * noise), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, variables(LINEAR_MIXERS[mixer.kind], config), is_leaf=is_variable)
    return Layer(config, params)


@pytest.fixture(scope="module")
def go_on(layer):
    """(x, segments, state) -> (y, state after it), of at most 30 tokens, by one program."""
    whole = jax.jit(partial(layer, layer.params))

    def padded(x, segments, state=layer.empty):
        more = ((0, 0), (0, 30 - x.shape[1]))
        y, state = whole(np.pad(x, (*more, (0, 0))), np.pad(segments, more), state)
        return y[:, : x.shape[1]], state

    return padded


@pytest.fixture(scope="module")
def run(go_on):
    return lambda x, segments: go_on(x, segments)[0]


def inputs(tokens=30):
    return np.random.default_rng(1).standard_normal((1, tokens, 16)).astype(np.float32)


def close(actual, expected, bound=2e-5):
    assert np.abs(expected).max() > 0.1  # else equal would mean little
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * max(np.abs(expected).max(), 1))


def test_the_output_is_that_of_the_recurrence_written_out(layer, run):
    """In float64, token by token, from the papers: tests/layers.py."""
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layer.params)
    close(run(inputs(), np.ones((1, 30), np.int32))[0], layer_output(layer.config, exact, np.float64(inputs()[0])))


@pytest.mark.slow
def test_the_gradients_are_those_of_the_recurrence_written_out(layer):
    x, weights = inputs(6), inputs(12)[:, 6:]

    def ours(params, x):
        return jnp.sum(layer(params, x, jnp.ones(x.shape[:2], jnp.int32))[0] * weights)

    gradients = jax.jit(jax.grad(ours, argnums=(0, 1)))(layer.params, x)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (layer.params, x))

        def written_out(params, x):
            return jnp.sum(layer_output(layer.config, params, x[0]) * weights[0])

        expected = jax.jit(jax.grad(written_out, argnums=(0, 1)))(*exact)
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert np.abs(wanted).max() > 1e-4, f"{where} has no effect"
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=where)


def test_chunked_equals_recurrent(layer, run):
    x, segments = inputs(), np.ones((1, 30), np.int32)
    step = jax.jit(lambda x, state: layer(layer.params, x, jnp.ones((1, 1), jnp.int32), state))
    state, outputs = layer.empty, []
    for t in range(30):
        y, state = step(x[:, t : t + 1], state)
        outputs.append(y)
    close(run(x, segments), jnp.concatenate(outputs, axis=1))


def test_a_state_goes_on_where_a_chunk_ended(go_on, run):
    """And what is padding on the right of a chunk does not change it."""
    x = inputs()
    first = np.where(np.arange(24) < 17, 1, 0)[None].astype(np.int32)
    begun = np.concatenate([x[:, :17], inputs(24)[:, :7]], axis=1)
    y, state = go_on(begun, first)
    rest, _ = go_on(x[:, 17:], np.ones((1, 13), np.int32), state)
    close(np.concatenate([y[:, :17], rest], axis=1), run(x, np.ones((1, 30), np.int32)))


def test_packed_documents_equal_separate_ones(run):
    x, segments = inputs(), np.array([[1] * 9 + [2] * 15 + [5] * 6])
    ends = [(0, 9), (9, 24), (24, 30)]
    alone = [run(x[:, a:b], np.ones((1, b - a), np.int32)) for a, b in ends]
    close(run(x, segments), np.concatenate(alone, axis=1))


def test_left_padding_equals_none(run):
    x, segments = inputs(), np.array([[0] * 11 + [1] * 19])
    close(run(x, segments)[:, 11:], run(x[:, 11:], np.ones((1, 19), np.int32)))
