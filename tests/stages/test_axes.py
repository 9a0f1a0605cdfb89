"""Every stage, and decoding, on meshes of eight devices against one device: loss, updated parameters, decode state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.decode import Chunk, decode_token, embedded, initial_states, prefill_layer, unstack
from jaxhybrid.model.mixers.deltanet import DeltaNetConfig
from jaxhybrid.model.mixers.fixed_decay import FixedDecayConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.kimi_delta import KimiDeltaConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.mixers.rwkv7 import RWKV7Config
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.model.partition import batch_sharding, make_mesh, param_shardings, rows_sharding
from jaxhybrid.model.transformer import Model, forward, model_variables, outputs
from jaxhybrid.stages.align import align_step, linear_mixers
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.stages.score import candidate_params, score_step
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.tiny import training

F = FULL_ATTENTION
# A large eps keeps the first Adam update proportional to the gradient: with none it is the sign of rounding noise.
RATES = training(10, learning_rate=1e-3, mixer_learning_rate=1e-2, eps=1e-2)
CONVOLVED = GatedDeltaNetConfig(conv_size=3)
FEW_STATES = GatedDeltaNetConfig(expand_kv=False)
OTHERS = [
    DeltaNetConfig(conv_size=3), KimiDeltaConfig(low_rank=4), FixedDecayConfig(), Mamba2Config(expand_kv=False),
    RWKV6Config(low_rank=4), RWKV7Config(low_rank=4),
    WindowAttentionConfig(window=4, sinks=2),
]  # fmt: skip
slow = pytest.mark.slow


def mesh_of(shape):
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def on(model, mesh):
    return Model(jax.device_put(model.params, param_shardings(model_variables(model.config), mesh)), model.config)


def stage_steps(teacher, linear, hybrid):
    """name -> (parameters, step(state, teacher, batch), whose they are)."""
    static = {"dtype": jnp.float32}

    def score(state, teacher, batch, optimizer):
        hidden, head = outputs(teacher, batch["tokens"], batch["segment_ids"])
        batch = {**batch, "teacher_hidden": hidden}
        return score_step(state, jnp.int32(2), batch, head, config=linear.config, optimizer=optimizer, **static)

    distill = partial(distill_step, config=hybrid.config, **static)

    def finetune(state, _, batch, optimizer):
        return finetune_step(state, batch, config=hybrid.config, optimizer=optimizer, **static)

    return {
        "align": (lambda linear, *_: linear_mixers(linear.params), partial(align_step, config=linear.config, **static)),
        "score": (lambda linear, _, teacher: candidate_params(linear, teacher, jnp.int32(2)), score),
        "distill": (lambda _, hybrid, __: hybrid.params, distill),
        "products kept": (lambda _, hybrid, __: hybrid.params, partial(distill, remat="mlp")),
        "finetune": (lambda _, hybrid, __: hybrid.params, finetune),
        "unrolled": (lambda _, hybrid, __: hybrid.params, partial(distill, remat="mlp", unroll=True)),
        "unrolled align": (
            lambda linear, *_: linear_mixers(linear.params),
            partial(align_step, config=linear.config, unroll=True, **static),
        ),
    }


def update(stage, teacher, linear, hybrid, batch):
    choose, step = stage_steps(teacher, linear, hybrid)[stage]
    params = jax.jit(choose)(linear, hybrid, teacher)
    optimizer = make_optimizer(RATES, params)
    state = jax.jit(lambda params: start(params, optimizer))(params)
    return jax.jit(partial(step, optimizer=optimizer))(state, teacher, batch)


ALONE = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]
PAIRS = [(2, 4, 1, 1), (2, 1, 4, 1), (2, 1, 1, 4), (1, 2, 4, 1), (1, 4, 1, 2), (1, 1, 2, 4)]


# 61 words do not divide, 60 divide over `tensor` and not over the rest, 64 over all; two K/V heads are fewer than four
# devices of `tensor`.
@pytest.mark.parametrize(
    ("shape", "vocab_size", "mixer"),
    [
        ((1, 2, 2, 2), 60, CONVOLVED),
        ((2, 1, 4, 1), 61, FEW_STATES),
        *(pytest.param(shape, 64, GLAConfig(), marks=slow) for shape in ALONE),
        *(pytest.param(shape, vocab, CONVOLVED, marks=slow) for shape, vocab in zip(PAIRS, (60, 61, 64) * 2)),
        *(pytest.param((1, 2, 2, 2), 64, mixer, marks=slow, id=mixer.kind) for mixer in OTHERS),
    ],
)
@pytest.mark.parametrize(
    "stage",
    [
        "align", "score", "distill", "finetune",
        *(pytest.param(stage, marks=slow) for stage in ("products kept", "unrolled", "unrolled align")),
    ],
)  # fmt: skip
def test_devices_together_equal_one(stage, shape, vocab_size, mixer):
    # A small eps magnifies rounding in norms of small outputs: with 1e-5 and lightning or Kimi delta attention one
    # device's float32 gradient norm is 2e-5 off float64's, in which meshes equal one device to 1e-7.
    eps = 1e-3 if mixer.kind in ("fixed_decay", "kimi_delta") else 1e-5
    teacher = make_teacher(vocab_size=vocab_size, tie_embeddings=vocab_size == 60, norm_eps=eps)
    G = mixer.kind
    linear, hybrid = (convert(teacher, types, mixer, jax.random.key(1)) for types in ((G,) * 4, (G, F, G, G)))
    batch = make_batch(vocab_size, batch=shape[0] * shape[1])
    expected, metrics = update(stage, teacher, linear, hybrid, batch)

    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        placed = (on(model, mesh) for model in (teacher, linear, hybrid))
        actual, sharded = update(stage, *placed, jax.device_put(batch, batch_sharding(mesh)))
    # A KL is a difference of log probabilities near 4, which float32 has to 2e-7; windows' KL is 1e-3.
    np.testing.assert_allclose(sharded["loss"], metrics["loss"], rtol=1e-5, atol=5e-8)
    np.testing.assert_allclose(sharded["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        # Sums in another order: 2e-5 for gradients, and twice that for their squares, the second moments.
        bound = (4e-5 if ".nu[" in jax.tree_util.keystr(path) else 2e-5) * max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
    moments = jax.tree.leaves(actual.optimizer)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in moments)
    assert on_one < 1.5 * sum(x.nbytes for x in moments) / (shape[1] * shape[3])


@pytest.mark.parametrize(
    ("shape", "mixer"),
    [
        ((1, 2, 4, 1), FEW_STATES),
        ((2, 1, 2, 2), CONVOLVED),
        *(pytest.param(shape, GLAConfig(), marks=slow) for shape in (*ALONE, *PAIRS)),
        *(pytest.param((1, 2, 2, 2), mixer, marks=slow, id=mixer.kind) for mixer in OTHERS),
    ],
)
def test_decoding_on_a_mesh_equals_one_device(shape, mixer):
    """Logits and state after prompts and one more token; heads that are fewer than devices lie there twice."""
    teacher = make_teacher(vocab_size=60, num_layers=3)
    model = convert(teacher, (mixer.kind, F, mixer.kind), mixer, jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 60, (8, 6)).astype(np.int32)
    lengths = (5 - np.arange(8) % 3).astype(np.int32)

    def run(model, tokens, lengths):
        own, states = unstack(model, jnp.float32), list(initial_states(model.config, 8, 8, jnp.float32))
        chunk, x = Chunk(jnp.int32(0), lengths, jnp.int32(6), None), embedded(own, tokens[:, :5])
        for layer, kind in enumerate(model.config.layer_types):
            x, states[layer] = prefill_layer(model.config, kind, own.layers[layer], x, states[layer], chunk)
        return decode_token(own, tokens[:, 5], tuple(states), lengths)

    expected = jax.jit(run)(model, tokens, lengths)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        actual = jax.jit(run)(on(model, mesh), *jax.device_put((tokens, lengths), rows_sharding(mesh)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        for axis, (ours, theirs) in enumerate(zip(a.shape, b.shape)):
            b = np.repeat(b, ours // theirs, axis)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_logits_of_a_split_model_equal_one_devices(teacher, batch):
    expected = jax.jit(forward)(teacher, batch["tokens"], batch["segment_ids"])
    mesh = mesh_of((1, 2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_sharding(mesh))
        actual = jax.jit(forward)(on(teacher, mesh), placed["tokens"], placed["segment_ids"])
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def equations(jaxpr):
    """Every equation of a program, those inside loops and branches too."""
    for equation in jaxpr.eqns:
        yield equation
        for given in equation.params.values():
            for part in given if isinstance(given, tuple) else (given,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def traced_distillation(vocab_size, sums):
    """The equations that run on each device, of a step in bfloat16 on weights split eight ways."""
    teacher = make_teacher(vocab_size=vocab_size)
    hybrid = convert(teacher, (CONVOLVED.kind, F, F, CONVOLVED.kind), CONVOLVED, jax.random.key(1))
    mesh = mesh_of((1, 4, 1, 2))
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(RATES, hybrid.params)
        step = partial(distill_step, config=hybrid.config, optimizer=optimizer, sums=sums)
        state = start(on(hybrid, mesh).params, optimizer)
        batch = jax.device_put(make_batch(vocab_size, batch=4), batch_sharding(mesh))
        program = jax.jit(step).trace(state, on(teacher.cast(jnp.bfloat16), mesh), batch).jaxpr
    shards = [e for e in equations(program.jaxpr) if e.primitive.name == "shard_map"]
    return [inner for e in shards for inner in equations(e.params["jaxpr"])], teacher.config


def test_no_device_holds_a_whole_embedding_or_head():
    found, config = traced_distillation(4096, jnp.float32)
    largest = max(x.aval.size for e in found for x in e.outvars)
    assert largest < config.vocab_size * config.hidden_size // 2


@pytest.mark.parametrize("sums", [jnp.float32, jnp.bfloat16])
def test_gradients_are_scattered_in_the_dtype_that_was_asked_for(sums):
    """And each block's weights are, none summed whole: what is not split over `fsdp` is small."""
    found, config = traced_distillation(64, sums)
    scattered = [e.invars[0].aval for e in found if e.primitive.name == "reduce_scatter"]
    # Beside them: keys and values of split rows, and the hidden states' gradient, summed over the head's columns.
    weights = [x for x in scattered if x.ndim < 4 and x.shape[0] != 4 * 24]
    assert {x.dtype for x in weights} == {jnp.dtype(sums)}
    sizes = {x.size for x in weights}
    assert config.hidden_size * config.intermediate_size in sizes
    summed = [v.aval.size for e in found if e.primitive.name.startswith("psum") for v in e.outvars]
    assert max(summed) < config.hidden_size * config.intermediate_size
