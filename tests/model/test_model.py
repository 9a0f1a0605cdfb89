"""The forward pass: packing, long rows, precision, remat, patterns, and meshes that do not fit."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType

from jaxhybrid.errors import TopologyError, WeightsError
from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.layers import Block, TokenContext, segment_positions
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.linear import recurrence
from jaxhybrid.model.partition import MESH_AXES, make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, embed, final_norm, forward, hidden_states, model_variables, token_context
from jaxhybrid.model.walk import collect, spread
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.oracles import row

G = GatedDeltaNetConfig.kind

SETTINGS = {
    "softmax": None,
    "linear": GatedDeltaNetConfig(),
    "convolved": GatedDeltaNetConfig(conv_size=3, rope=True, expand_kv=False),
    "gla": GLAConfig(),
}


@pytest.fixture(scope="module", params=SETTINGS)
def model(request):
    teacher, mixer = make_teacher(num_layers=3), SETTINGS[request.param]
    make = jax.jit(convert, static_argnums=(1, 2))
    return teacher if mixer is None else make(teacher, (mixer.kind, F, mixer.kind), mixer, jax.random.key(1))


def logits(model, tokens, segments=None):
    return run(model, np.asarray(tokens), np.ones_like(tokens) if segments is None else segments)


@jax.jit
def run(model, tokens, segments):
    return forward(model, tokens, segments)


def test_packed_documents_equal_separate_ones(model):
    tokens = np.arange(1, 16)[None] % model.config.vocab_size
    segments = np.array([[1] * 6 + [2] * 9])
    packed = logits(model, tokens, segments)
    first, second = logits(model, tokens[:, :6]), logits(model, tokens[:, 6:])
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], axis=1), atol=2e-4)


def test_left_padding_equals_none(model):
    tokens = np.array([[5, 6, 7, 8, 9]])
    padded = np.concatenate([np.full((1, 4), 3), tokens], axis=1)
    segments = np.array([[0] * 4 + [1] * 5])
    np.testing.assert_allclose(logits(model, padded, segments)[:, 4:], logits(model, tokens), atol=2e-4)


def test_later_tokens_do_not_change_earlier_ones(model):
    tokens = np.array([[5, 6, 7, 8, 9, 10]])
    changed = tokens.copy()
    changed[0, 4:] = 20
    before, after = (logits(model, t) for t in (tokens, changed))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-2


def gradients(model, remat, unroll=False):
    batch = make_batch(model.config.vocab_size)

    @jax.jit
    @jax.grad
    def of_loss(params):
        own = Model(params, model.config)
        out = hidden_states(own, batch["tokens"], batch["segment_ids"], remat=remat, unroll=unroll)
        return jnp.mean(jnp.sin(out))

    return of_loss(model.params)


@pytest.fixture(scope="module")
def kept_gradients(model):
    return gradients(model, "none")


QUICK = {("block", False), ("mlp", False)}
QUICK_OF = dict.fromkeys(SETTINGS, QUICK)  # the rest is for long studies
QUICK_OF["convolved"] = QUICK | {("dots", False), ("offload", False), ("mlp", True)}  # it has most in its layers


@pytest.mark.parametrize(
    ("model", "policy", "unroll"),
    [
        pytest.param(name, *how, marks=() if how in QUICK_OF[name] else pytest.mark.slow)
        for name in SETTINGS
        for how in [("none", True), *product(("block", "mlp", "dots", "offload"), (False, True))]
    ],
    indirect=["model"],
)
def test_remat_gives_the_same_gradients(model, kept_gradients, policy, unroll):
    again = gradients(model, policy, unroll)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(kept_gradients), jax.tree.leaves(again), strict=True):
        bound = 1e-4 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_mlp_computes_no_part_of_softmax_attention_again(normed, unroll):
    """As lowered for a Hopper GPU, beside `block`, which computes all of a layer but the MLP's last product again."""
    teacher = make_teacher(head_dim=64, qk_norm=normed)
    batch = make_batch(teacher.config.vocab_size)

    def counted(policy):
        def loss(params):
            own = Model(params, teacher.config)
            out = hidden_states(
                own, batch["tokens"], batch["segment_ids"], dtype=jnp.bfloat16, remat=policy, unroll=unroll
            )
            return jnp.sum(out.astype(jnp.float32))

        hopper = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
        unchecked = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=hopper)):
            gradient = jax.jit(jax.grad(loss))
            text = export.export(gradient, platforms=["cuda"], disabled_checks=unchecked)(teacher.params).mlir_module()
        return text.count("mosaic_gpu_v2"), text.count("stablehlo.dot_general")

    (kernels, products), (again, products_again) = counted("mlp"), counted("block")
    assert (kernels, again) == (3, 4)  # one forward and two for the gradients, and the one forward once more
    # gate, up, o and v; q and k, too, unless heads have norms, whose gradients need what these gave
    assert products_again - products == (4 if normed else 6)


def test_bfloat16_is_near_float32(model, batch):
    low = jax.jit(partial(forward, dtype=jnp.bfloat16))(model, batch["tokens"], batch["segment_ids"])
    high = logits(model, batch["tokens"], batch["segment_ids"])
    a, b = np.asarray(low, np.float64).ravel(), np.asarray(high, np.float64).ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize("types", [(G, G, F, G, F, F), (F, F, G), (G,), (F, G, F, G)])
def test_rows_are_spread_over_the_layers_and_collected_again(types):
    for kind in dict.fromkeys(types):
        layers = [layer for layer, name in enumerate(types) if name == kind]
        rows = {"w": jnp.array(layers, jnp.float32)[:, None] + 1}
        placed = spread(rows, types, kind)["w"][:, 0]
        np.testing.assert_array_equal(placed, [layer + 1 if layer in layers else 0 for layer in range(len(types))])
        np.testing.assert_array_equal(collect({"w": placed[:, None]}, types, kind)["w"], rows["w"])


def test_one_scan_walks_all_layers(model, batch):
    """Against the blocks applied one after the other, each with its own row of its kind's stack."""
    context = token_context(model.config, batch["tokens"], batch["segment_ids"], None)
    params, used = model.params, dict.fromkeys(model.config.layer_types, 0)
    expected = embed(model, batch["tokens"])
    for layer, kind in enumerate(model.config.layer_types):
        block = bind(Block, model.config, row(params["blocks"], layer))
        mixer = bind(MIXERS[kind], model.config, row(params["mixers"][kind], used[kind]))
        expected = block.add_mlp(expected + mixer(block.mixer_input(expected), context)[0])
        used[kind] += 1

    hidden = hidden_states(model, batch["tokens"], batch["segment_ids"])
    np.testing.assert_allclose(hidden, final_norm(model, expected), rtol=1e-5, atol=1e-4)


def test_positions_restart_with_each_document():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(segment_positions(segments), [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "8 devices do not divide by the 3 of mesh data=3 x tensor=1 x context=1"),
        ({"data": 2, "fsdp": 2}, "needs 4 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "only one of data and fsdp"),
        ({"tensor": -1, "fsdp": 1}, "tensor are -1; only one of data and fsdp"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(TopologyError, match=message):
        make_mesh(**sizes)


def test_a_width_that_does_not_divide_is_named(teacher):
    config = replace(teacher.config, hidden_size=36)
    with pytest.raises(TopologyError, match=r"36 does not divide over fsdp=4 x context=2"):
        param_shardings(model_variables(config), make_mesh(1, 4, 1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 45}, r"mlp.*: 45 does not divide over tensor=2"),
        ({"num_heads": 3, "num_kv_heads": 3}, r"k_proj.*: 3 does not divide over tensor=2"),
    ],
)
def test_what_tensor_cannot_split_is_named(teacher, changes, message):
    config = replace(teacher.config, **changes)
    with pytest.raises(TopologyError, match=message):
        param_shardings(model_variables(config), make_mesh(1, 4, 2, 1))


@pytest.mark.parametrize(
    ("shape", "names", "kind", "message"),
    [
        ((8,), ("x",), AxisType.Explicit, "needs .*'context'"),
        ((2, 4, 1, 1), MESH_AXES, AxisType.Auto, "must be AxisType.Explicit"),
    ],
)
def test_a_callers_mesh_of_another_kind_is_refused(teacher, shape, names, kind, message):
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    with jax.set_mesh(mesh), pytest.raises(TopologyError, match=message):
        forward(teacher, jnp.ones((8, 4), jnp.int32))


def test_a_decay_may_be_the_layers_own():
    """One number a state, whatever the token."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (8, 12, 4, 8)) for key in keys)
    decay, whole_rows = -jnp.array([0.1, 0.2, 0.5, 1.0]), TokenContext(None, jnp.ones(()), jnp.ones(()))
    expected, _ = recurrence(q, k, v, jnp.broadcast_to(decay, (8, 12, 4)), None, whole_rows, None)
    actual, _ = recurrence(q, k, v, decay, None, whole_rows, None)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_parameters_of_another_model_are_named(teacher):
    softmax = teacher.params["mixers"][F]
    params = teacher.params | {"mixers": {F: {**softmax, "q_norm": {"scale": jnp.ones((4, 8))}}}}
    with pytest.raises(WeightsError, match=r"about mixers\.full_attention\.q_norm\.scale\."):
        forward(Model(params, teacher.config), jnp.ones((1, 4), jnp.int32))
