"""Teacher -> student: what is carried, cloned, drawn anew, and refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import is_variable
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import NORMALIZER, GLAConfig
from jaxhybrid.model.transformer import Model, forward, model_variables, random_params
from jaxhybrid.weights.convert import convert

G = GatedDeltaNetConfig.kind

PATTERN = (G, F, G, G)


def with_config(teacher, **changes):
    """The teacher with another description and random parameters for it."""
    config = replace(teacher.config, **changes)
    return Model(random_params(config, jax.random.key(3)), config)


def test_grouped_heads_are_cloned_whole(teacher):
    """Planted: row r of K/V head g holds 100 g + r. Repeating rows instead of heads would mix them within a head."""
    D, K = teacher.config.hidden_size, teacher.config.head_dim
    planted = jnp.broadcast_to(100.0 * jnp.arange(2)[:, None] + jnp.arange(K), (4, D, 2, K))
    attention = teacher.params["mixers"][F] | {"k_proj": {"kernel": planted}, "v_proj": {"kernel": planted + 0.5}}
    model = Model({**teacher.params, "mixers": {F: attention}}, teacher.config)
    student = convert(model, PATTERN, GatedDeltaNetConfig(), jax.random.key(0)).params["mixers"][G]
    for head in range(4):  # query heads 0, 1 read K/V head 0; heads 2, 3 read head 1
        expected = 100.0 * (head // 2) + np.arange(K)
        np.testing.assert_array_equal(student["k_proj"]["kernel"][0, 0, head], expected)
        np.testing.assert_array_equal(student["v_proj"]["kernel"][0, 0, head], expected + 0.5)


@pytest.mark.parametrize("expand", [True, False])
def test_a_gate_copied_from_the_values_has_the_values_heads(teacher, expand):
    """Query head i is gated by the K/V head that it reads."""
    mixer = GatedDeltaNetConfig(expand_kv=expand, gate_init="value")
    student = convert(teacher, PATTERN, mixer, jax.random.key(0)).params["mixers"][G]
    values = teacher.params["mixers"][F]["v_proj"]["kernel"][np.array([0, 2, 3])]
    for head in range(4):
        np.testing.assert_array_equal(student["g_proj"]["kernel"][:, :, head], values[:, :, head // 2])


def test_grouped_states_keep_the_teachers_heads(teacher):
    student = convert(teacher, PATTERN, GatedDeltaNetConfig(expand_kv=False), jax.random.key(0))
    rows = np.array([0, 2, 3])
    mixer, attention = student.params["mixers"][G], teacher.params["mixers"][F]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        np.testing.assert_array_equal(mixer[name]["kernel"], attention[name]["kernel"][rows])
    assert mixer["A_log"].shape == (3, 2)


def test_everything_shared_is_the_teachers(teacher):
    student = convert(teacher, PATTERN, GatedDeltaNetConfig(), jax.random.key(0))
    for name in ("embed", "final_norm", "head"):
        jax.tree.map(np.testing.assert_array_equal, student.params[name], teacher.params[name])
    jax.tree.map(np.testing.assert_array_equal, student.params["blocks"], teacher.params["blocks"])
    kept = jax.tree.map(lambda w: w[1:2], teacher.params["mixers"][F])
    jax.tree.map(np.testing.assert_array_equal, student.params["mixers"][F], kept)


@pytest.mark.parametrize("expand", [True, False])
def test_biases_and_norms_are_carried(teacher, expand):
    source = with_config(teacher, qkv_bias=True, o_bias=True, qk_norm=True)
    keys = iter(range(100))
    attention = jax.tree.map(lambda w: w + 0.1 * (1 + next(keys)), source.params["mixers"][F])
    model = Model({**source.params, "mixers": {F: attention}}, source.config)
    student = convert(model, (G,) * 4, GatedDeltaNetConfig(expand_kv=expand), jax.random.key(0))
    mixer = student.params["mixers"][G]
    repeats = 2 if expand else 1
    for name in ("q_proj", "o_proj", "q_norm", "k_norm"):
        jax.tree.map(np.testing.assert_array_equal, mixer[name], attention[name])
    for name in ("k_proj", "v_proj"):
        np.testing.assert_array_equal(mixer[name]["bias"], np.repeat(attention[name]["bias"], repeats, axis=1))
    assert student.config.mixer.qkv_bias
    assert student.config.mixer.qk_norm


def test_leaving_a_bias_behind_is_said(teacher):
    source = with_config(teacher, qkv_bias=True)
    with pytest.warns(UserWarning, match="qkv_bias=False: the teacher's qkv_bias is not carried"):
        student = convert(source, PATTERN, GatedDeltaNetConfig(qkv_bias=False), jax.random.key(0))
    assert "bias" not in student.params["mixers"][G]["q_proj"]


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (GatedDeltaNetConfig(qkv_bias=True), "the teacher has no qkv_bias"),
        (GatedDeltaNetConfig(qk_norm=True), "the teacher has no qk_norm"),
    ],
)
def test_what_cannot_be_carried_is_refused(teacher, mixer, message):
    with pytest.raises(ConfigError, match=message):
        convert(teacher, PATTERN, mixer, jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [(partial(GatedDeltaNetConfig, conv_size=1), "conv_size=1"), (partial(GLAConfig, decay_rank=0), "decay_rank=0")],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_student_is_no_teacher(teacher):
    student = convert(teacher, PATTERN, GatedDeltaNetConfig(), jax.random.key(0))
    with pytest.raises(ConfigError, match="already has linear layers"):
        convert(student, PATTERN, GatedDeltaNetConfig(), jax.random.key(0))


@pytest.mark.parametrize(("types", "message"), [((G,) * 3, "names 3 layers"), ((G, F, G, "mamba"), "'mamba'")])
def test_bad_layer_types_are_refused(teacher, types, message):
    with pytest.raises(ConfigError, match=message):
        convert(teacher, types, GatedDeltaNetConfig(), jax.random.key(0))


@pytest.mark.parametrize(
    "mixer",
    [
        GatedDeltaNetConfig(),
        GatedDeltaNetConfig(expand_kv=False, output_gate=False, decay_init="slow"),
        GatedDeltaNetConfig(conv_size=4, rope=True, gate_init="value"),
        GLAConfig(expand_kv=False, gate_init="value", decay_init="slow"),
    ],
)
def test_jitted_and_as_declared(teacher, mixer, batch):
    make = jax.jit(convert, static_argnums=(1, 2))
    pattern = tuple(mixer.kind if kind == G else kind for kind in PATTERN)
    student = make(teacher, pattern, mixer, jax.random.key(5))
    plain = convert(teacher, pattern, mixer, jax.random.key(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), student.params, plain.params)
    shapes = jax.tree.map(lambda spec: spec.shape, model_variables(student.config), is_leaf=is_variable)
    assert jax.tree.map(lambda x: x.shape, student.params) == shapes
    assert np.isfinite(forward(student, batch["tokens"], batch["segment_ids"])).all()


def test_identity_convolution_changes_nothing(teacher, batch):
    plain = convert(teacher, PATTERN, GatedDeltaNetConfig(), jax.random.key(5))
    convolved = convert(teacher, PATTERN, GatedDeltaNetConfig(conv_size=4), jax.random.key(5))
    shared = {name: plain.params["mixers"][G][name] for name in plain.params["mixers"][G]}
    params = {**convolved.params, "mixers": {**convolved.params["mixers"], G: convolved.params["mixers"][G] | shared}}
    np.testing.assert_allclose(
        forward(Model(params, convolved.config), **batch_arguments(batch)),
        forward(plain, **batch_arguments(batch)),
        atol=1e-5,
    )


def batch_arguments(batch):
    return {"tokens_BT": batch["tokens"], "segment_ids_BT": batch["segment_ids"]}


def test_zero_gate_and_slow_decay_start_as_they_say(teacher):
    mixer = convert(
        teacher, PATTERN, GatedDeltaNetConfig(gate_init="zero", decay_init="slow"), jax.random.key(0)
    ).params["mixers"][G]
    assert not mixer["g_proj"]["kernel"].any()
    half_lives = np.log(2) / (np.exp(mixer["A_log"]) * np.log1p(np.exp(mixer["dt_bias"])))
    np.testing.assert_allclose(half_lives[0, [0, -1]], [64, 4096], rtol=1e-3)


def test_gla_starts_with_the_half_lives_it_says(teacher):
    kinds = tuple(GLAConfig.kind if kind == G else kind for kind in PATTERN)
    mixer = convert(teacher, kinds, GLAConfig(decay_init="slow"), jax.random.key(0)).params["mixers"][GLAConfig.kind]
    assert not mixer["a_up_proj"]["kernel"].any()
    log_decay = -np.log1p(np.exp(-np.asarray(mixer["a_up_proj"]["bias"], np.float64))) / NORMALIZER
    np.testing.assert_allclose(np.log(0.5) / log_decay[0, [0, -1], 0], [64, 4096], rtol=1e-3)
