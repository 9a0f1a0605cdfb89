"""Every mixer of converted layers by itself: against its formula written out, and against itself, chunked and not."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from jaxhybrid.errors import ConfigError
from jaxhybrid.export.folder import export
from jaxhybrid.export.remote_code.modeling_jaxhybrid import JaxHybridForCausalLM
from jaxhybrid.model.attention import Attention
from jaxhybrid.model.blueprint import bind, initialize, is_variable, variables
from jaxhybrid.model.config import LinearConfig, ModelConfig, WindowConfig
from jaxhybrid.model.layers import segment_positions
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.model.mixers.deltanet import DeltaNetConfig
from jaxhybrid.model.mixers.fixed_decay import FixedDecayConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.kimi_delta import KimiDeltaConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.mixers.rwkv7 import RWKV7Config
from jaxhybrid.model.mixers.window_attention import WindowAttention, WindowAttentionConfig
from jaxhybrid.model.transformer import Model, model_variables, token_context
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_student
from tests.conftest import make_batch, make_teacher
from tests.layers import layer_output
from tests.tiny import training

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
    "mamba2_by_head": Mamba2Config(ssm_conv_size=3, head_norm=True, **CARRIED),
    "rwkv6": RWKV6Config(low_rank=4, expand_kv=False, **CARRIED),
    "rwkv7": RWKV7Config(low_rank=4, **CARRIED),
    "window_attention": WindowAttentionConfig(window=7),
    "sinks": WindowAttentionConfig(window=5, sinks=3),
}


SLOW = (
    "gated_deltanet",
    "gla",
    "deltanet",
    "retnet",
    "mamba2_by_head",
    "window_attention",
)  # in most other tests, or of shared code


def test_every_mixer_is_here():
    assert {mixer.kind for mixer in MIXERS.values()} == set(STUDENT_MIXERS)


@dataclass(frozen=True)
class Layer:
    config: ModelConfig
    params: dict

    def __call__(self, params, x, segments, state=None, first=0):
        """segments: None for one token of each row; first: the place of the first one in its document."""
        ones = jnp.ones(x.shape[:2], jnp.int32)
        positions = segment_positions(ones if segments is None else segments) + first
        context = token_context(self.config, ones, segments, positions)
        return bind(STUDENT_MIXERS[self.config.mixer.kind], self.config, params)(x, context, state)

    @property
    def empty(self):
        return STUDENT_MIXERS[self.config.mixer.kind].initial_state(self.config, 1, 0, jnp.float32)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MIXERS],
)
def layer(request):
    """One layer with nothing at a start that would hide it."""
    mixer = MIXERS[request.param]
    config = ModelConfig(
        family="qwen3", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=8, norm_eps=EPS, max_position_embeddings=64, layer_types=(mixer.kind,), mixer=mixer, o_bias=True,
        **CARRIED,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def draw(path, variable):
        noise = rng.standard_normal(variable.shape)
        names = {"scale": 1 + 0.3 * noise, "A_log": 0.5 * noise, "dt_bias": noise - 2, "decay_bias": noise - 2}
        return jnp.asarray(names.get(path[-1].key, 0.4 * noise), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, variables(STUDENT_MIXERS[mixer.kind], config), is_leaf=is_variable)
    return Layer(config, params)


@pytest.fixture(scope="module")
def go_on(layer):
    """(x, segments, state, first) -> (y, state after it), of at most 30 tokens, by one program."""
    whole = jax.jit(partial(layer, layer.params))

    def padded(x, segments, state=layer.empty, first=0):
        more = ((0, 0), (0, 30 - x.shape[1]))
        y, state = whole(np.pad(x, (*more, (0, 0))), np.pad(segments, more), state, first)
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
    step = jax.jit(lambda x, state, t: layer(layer.params, x, None, state, t))
    state, outputs = layer.empty, []
    for t in range(30):
        y, state = step(x[:, t : t + 1], state, t)
        outputs.append(y)
    close(run(x, segments), jnp.concatenate(outputs, axis=1))


def test_a_state_goes_on_where_a_chunk_ended(go_on, run):
    """And what is padding on the right of a chunk does not change it."""
    x = inputs()
    first = np.where(np.arange(24) < 17, 1, 0)[None].astype(np.int32)
    begun = np.concatenate([x[:, :17], inputs(24)[:, :7]], axis=1)
    y, state = go_on(begun, first)
    rest, _ = go_on(x[:, 17:], np.ones((1, 13), np.int32), state, 17)
    close(np.concatenate([y[:, :17], rest], axis=1), run(x, np.ones((1, 30), np.int32)))


def test_a_window_that_holds_all_is_the_teachers_attention():
    """With the teacher's weights, which conversion takes as they are."""
    config = replace(make_teacher(num_layers=1, hidden_size=16).config, mixer=WindowAttentionConfig(window=30))
    params = jax.tree.map(jnp.asarray, initialize(Attention, config, jax.random.key(0)))
    ones = jnp.ones((1, 30), jnp.int32)
    context, x = token_context(config, ones, ones, None), jnp.asarray(inputs())
    teacher, _ = bind(Attention, config, params)(x, context)
    own = WindowAttention.from_attention(params, config)
    np.testing.assert_array_equal(bind(WindowAttention, config, own)(x, context)[0], teacher)
    shorter = replace(config, mixer=WindowAttentionConfig(window=29, sinks=1))
    np.testing.assert_allclose(bind(WindowAttention, shorter, own)(x, context)[0], teacher, rtol=0, atol=1e-6)
    cut = replace(config, mixer=WindowAttentionConfig(window=29))
    y = bind(WindowAttention, cut, own)(x, context)[0]
    assert np.abs(y - teacher)[:, :29].max() < 1e-6 < np.abs(y - teacher)[:, 29].max()


def test_windows_that_say_nothing_are_refused_or_warned_of():
    teacher = make_teacher().config
    with pytest.raises(ConfigError, match=r"mixer\.window=62 with mixer\.sinks=2 holds"):
        WindowAttentionConfig(window=62, sinks=2).resolve(replace(teacher, max_position_embeddings=64))
    slides = replace(teacher, window=WindowConfig(8, (1,)))
    with pytest.warns(UserWarning, match=r"the teacher's layers \[1\] see 8 tokens"):
        WindowAttentionConfig(window=9).resolve(slides)


def test_packed_documents_equal_separate_ones(run):
    x, segments = inputs(), np.array([[1] * 9 + [2] * 15 + [5] * 6])
    ends = [(0, 9), (9, 24), (24, 30)]
    alone = [run(x[:, a:b], np.ones((1, b - a), np.int32)) for a, b in ends]
    close(run(x, segments), np.concatenate(alone, axis=1))


def test_left_padding_equals_none(run):
    x, segments = inputs(), np.array([[0] * 11 + [1] * 19])
    close(run(x, segments)[:, 11:], run(x[:, 11:], np.ones((1, 19), np.int32)))


@pytest.fixture(scope="module")
def exported(layer, tmp_path_factory):
    """The layer as a model, and the folder that it was exported to."""
    folder, declared = tmp_path_factory.mktemp("export") / "model", model_variables(layer.config)
    params = jax.tree.map(lambda variable: jnp.zeros(variable.shape), declared, is_leaf=is_variable)
    params["mixers"] = {layer.config.mixer.kind: jax.tree.map(lambda leaf: leaf[None], layer.params)}
    model = Model(params, layer.config)
    with pytest.warns(UserWarning, match="No tokenizer"):
        export(model, folder, dtype="float32")
    return model, folder


def test_an_export_is_read_back_exactly(exported):
    model, folder = exported
    again = load_student(folder)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_the_exported_layer_gives_the_same(layer, go_on, exported):
    """In PyTorch, with documents and padding, and in pieces with a cache."""
    _, folder = exported
    net = JaxHybridForCausalLM.from_pretrained(folder).eval()
    x, segments = inputs(), np.array([[0] * 4 + [1] * 10 + [3] * 13 + [0] * 3])
    expected, _ = go_on(x, segments)
    rotation = net.model.rotary_tables.rotary_emb(
        torch.from_numpy(x), torch.from_numpy(np.array(segment_positions(segments)))
    )
    real = torch.from_numpy(segments != 0)
    first = torch.from_numpy((np.arange(30) == 4) | (np.arange(30) == 14))[None]
    cache, ends = DynamicCache(config=net.config), [0, 9, 10, 16, 30]

    def piece(begin, end, cache):
        tables = tuple(table[:, begin:end] for table in rotation)
        at = torch.from_numpy(x[:, begin:end])
        return net.model.layers[0].linear_attn(at, tables, cache, real[:, begin:end], first[:, begin:end])

    with torch.no_grad():
        whole = piece(0, 30, None)
        pieces = torch.cat([piece(a, b, cache) for a, b in pairwise(ends)], dim=1)
    close(whole[real], expected[segments != 0])
    close(pieces[real], expected[segments != 0])


def test_the_exported_layer_runs_in_16_bits(layer, go_on, exported):
    """As exports are loaded by default: gates and decays stay float32, and nothing else does."""
    _, folder = exported
    net = JaxHybridForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    mixer, x, segments = net.model.layers[0].linear_attn, inputs(), np.ones((1, 30), np.int32)
    whole = {name.split(".")[0] for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert whole == set(mixer.float32)
    rotation = net.model.rotary_tables.rotary_emb(torch.from_numpy(x), torch.arange(30)[None])
    with torch.no_grad():
        y = mixer(torch.from_numpy(x).bfloat16(), rotation, None, None, None)
    close(y.float(), go_on(x, segments)[0], 0.05)


@pytest.mark.slow
def test_alignment_falls(layer):
    """From the start that conversion gives, beside a softmax teacher."""
    teacher = make_teacher(num_layers=2, hidden_size=16, intermediate_size=24, vocab_size=31)
    mixer = layer.config.mixer
    if isinstance(mixer, LinearConfig):
        mixer, steps, rate = replace(mixer, qkv_bias=None, qk_norm=None), 30, 1e-2
    else:  # begins near its teacher: with much out of sight there is something to learn
        mixer, steps, rate = replace(mixer, window=2, sinks=min(mixer.sinks, 1)), 60, 3e-3
    student = convert(teacher, (mixer.kind,) * 2, mixer, jax.random.key(1))
    settings = training(steps, learning_rate=rate)
    mixers = linear_mixers(student.params)
    optimizer = make_optimizer(settings, mixers)
    step = jax.jit(partial(align_step, config=student.config, optimizer=optimizer, dtype=jnp.float32))
    state, losses = start(mixers, optimizer), []
    batch = make_batch(31)
    for _ in range(settings.steps):
        state, metrics = step(state, teacher, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
