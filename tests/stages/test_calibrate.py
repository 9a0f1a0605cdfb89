"""Measured initial values: teachers for which they are known, plain sums, and each mixer that takes them."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.checksums import read_result
from jaxhybrid.errors import ConfigError, TopologyError
from jaxhybrid.model.blueprint import bind, initialize
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.layers import TokenContext
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.partition import batch_sharding, make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, embed, model_variables, random_params, token_context
from jaxhybrid.model.walk import walk
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.settings.read import load_config
from jaxhybrid.stages.align import align_loss, linear_mixers
from jaxhybrid.stages.batch import token_mask
from jaxhybrid.stages.calibrate import STRENGTHS, Unprojected, calibration, with_calibration
from jaxhybrid.train.placement import place_batch
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.tiny import stage, write_config, write_teacher

WIDTH, BACK = 16, (0, 1, 3, 5)  # tokens that the heads of `looking_back` look back
SHARP = 40.0  # attention logit of the token that is looked at; all others have 0


def looking_back():
    """A teacher of one layer whose head h gives, as far as its document goes, the value of the token BACK[h] before.

    Token n is the n-th unit vector, and the n-th token of a document. Two heads share a key, as G divides H.
    """
    config = ModelConfig(
        family="llama", vocab_size=WIDTH, hidden_size=WIDTH, intermediate_size=8, num_layers=1, num_heads=4,
        num_kv_heads=2, head_dim=WIDTH, norm_eps=1e-6, max_position_embeddings=64, unrotated_layers=(0,),
    )  # fmt: skip
    params = random_params(config, jax.random.key(0))
    eye, length = np.eye(WIDTH, dtype=np.float32), math.sqrt(WIDTH)  # of a normed unit vector
    attention = params["mixers"]["full_attention"]
    looked = [np.maximum(np.arange(WIDTH) - back, 0) for back in BACK]
    queries = np.stack([SHARP / length * eye[places] for places in looked], axis=1)
    keys = np.stack([eye / length * length] * 2, axis=1)
    attention["q_proj"]["kernel"], attention["k_proj"]["kernel"] = jnp.asarray(queries)[None], jnp.asarray(keys)[None]
    attention["v_proj"]["kernel"] = jnp.asarray(np.stack([eye, eye[::-1]], axis=1))[None]
    params["embed"]["embedding"] = jnp.asarray(eye)
    return Model(params, config)


def documents():
    """Rows of two documents and padding: tokens that would be found in the other document, too."""
    places = np.array([[*range(8), *range(6), 0, 0], [*range(11), *range(5)]], np.int32)
    segments = np.array([[1] * 8 + [2] * 6 + [0] * 2, [1] * 11 + [2] * 5], np.int32)
    return {"tokens": places, "segment_ids": segments}


def measured(teacher, mixer, batch, parts, change=lambda own: own, fits_decay=False):
    student = convert(teacher, (mixer.kind,) * teacher.config.num_layers, mixer, jax.random.key(1))
    mixers = {mixer.kind: change(linear_mixers(student.params)[mixer.kind])}
    run = partial(calibration, config=student.config, parts=parts, fits_decay=fits_decay, dtype=jnp.float32)
    return student.config, mixers, jax.jit(run)(mixers, teacher, batch)


@pytest.mark.parametrize("expand", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_heads_that_look_back_a_known_distance_get_it_as_half_life(expand):
    batch, mixer = documents(), GatedDeltaNetConfig(expand_kv=expand)
    config, mixers, values = measured(looking_back(), mixer, batch, ("decay",))
    places = batch["tokens"][batch["segment_ids"] > 0]
    expected = np.array([np.minimum(places, back).mean() for back in BACK])
    expected = np.maximum(expected if expand else expected.reshape(2, 2).mean(1), 0.5)
    np.testing.assert_allclose(values["half_lives"][0], expected, rtol=1e-5)
    own = with_calibration(mixers, values, config, ("decay",))[mixer.kind]
    steps = np.exp(own["A_log"]) * np.log1p(np.exp(own["dt_bias"]))
    np.testing.assert_allclose(np.log(2) / steps[0], expected, rtol=1e-5)
    assert not own["a_proj"]["kernel"].any()
    np.testing.assert_array_equal(own["q_proj"]["kernel"], mixers[mixer.kind]["q_proj"]["kernel"])


def test_a_head_with_half_the_teachers_context_gets_scale_two():
    """All look at their own token, and RWKV-6 has no norm: its context is the teacher's times a factor planted here."""
    factors = np.array([0.5, 1.0, 0.25, 0.01], np.float32)
    teacher = looking_back()
    own_token = teacher.params["mixers"]["full_attention"]["q_proj"]["kernel"][:, :, :1]
    teacher.params["mixers"]["full_attention"]["q_proj"]["kernel"] = jnp.repeat(own_token, 4, axis=2)

    def planted(own):
        # Half-lives of 0.5 write with 1 - 1/4, and the open gate is one half.
        scaled = own["q_proj"]["kernel"] * (factors / (SHARP * 0.75 * 0.5))[:, None]
        return own | {"q_proj": {"kernel": scaled}}

    parts = ("decay", "gate", "scale")
    config, mixers, values = measured(teacher, RWKV6Config(low_rank=4), documents(), parts, planted)
    np.testing.assert_allclose(values["scales"][0], [2, 1, 4, 10], rtol=1e-4)  # 100 is cut off
    own = with_calibration(mixers, values, config, parts)["rwkv6"]
    before = mixers["rwkv6"]["o_proj"]["kernel"]
    np.testing.assert_allclose(own["o_proj"]["kernel"], before * values["scales"][:, :, None, None], rtol=1e-6)


def test_strengths_and_scales_are_the_best_of_plain_sums(teacher, batch):
    mixer, parts = GatedDeltaNetConfig(expand_kv=False), ("strength", "scale")
    config, mixers, values = measured(teacher, mixer, batch, parts)
    mask = np.asarray(token_mask(batch["segment_ids"]), np.float64)

    def mix(normed, attention, context, own):
        o_proj, attention.o_proj = attention.o_proj, Unprojected()
        theirs, mean = attention(normed, context)[0], jnp.sum(normed * mask[..., None], axis=(0, 1)) / mask.sum()
        contexts = []
        for strength in STRENGTHS:
            column = mean / jnp.sum(mean**2)
            module = bind(LINEAR_MIXERS[mixer.kind], config, own)
            module.b_proj.kernel[...] = jnp.outer(column, jnp.full(2, math.log(strength / (1 - strength))))
            module.o_proj = Unprojected()
            contexts.append(module(normed, context)[0])
        return o_proj(theirs), (theirs, jnp.stack(contexts), mean)

    context = token_context(teacher.config, batch["tokens"], batch["segment_ids"], None)
    x = embed(teacher, batch["tokens"], jnp.float32)
    extra = {"full_attention": mixers[mixer.kind]}
    _, found = jax.jit(lambda x: walk(teacher.params, teacher.config, x, context, mix, extra=extra))(x)
    theirs, ours, mean = (np.asarray(x, np.float64) for x in found["full_attention"])
    crossed = np.einsum("lbthk,lsbthk,bt->lsh", theirs, ours, mask)
    length = np.einsum("lsbthk,lsbthk,bt->lsh", ours, ours, mask)
    best = (crossed**2 / length).reshape(4, len(STRENGTHS), 2, 2).sum(-1).argmax(1)
    np.testing.assert_allclose(values["strengths"], np.array(STRENGTHS)[best], rtol=1e-6)
    at = np.repeat(best, 2, axis=1)[:, None]
    expected = np.take_along_axis(crossed, at, 1)[:, 0] / np.take_along_axis(length, at, 1)[:, 0]
    np.testing.assert_allclose(values["scales"], np.clip(expected, 0.1, 10), rtol=1e-3)
    np.testing.assert_allclose(np.einsum("ld,ld->l", values["constant"], mean), 1, rtol=1e-5)


def taking(part, first):
    """Mixers that take it: one in every run of the tests, the others in the slow ones."""
    kinds = [kind for kind, mixer in LINEAR_MIXERS.items() if part in mixer.takes(mixer.Config())]
    return [pytest.param(kind, marks=[] if kind == first else pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", taking("decay", "gla"))
def test_a_state_halves_in_its_half_life(kind):
    """A token whose key is zero writes nothing: what is left of the memory is its decay."""
    config, own, x, context = layer(kind)
    mixer, lives = LINEAR_MIXERS[kind], jnp.array([2.0, 7.0, 100.0, 3000.0])
    own = mixer.with_half_lives(own, lives) | {"k_proj": {"kernel": jnp.zeros_like(own["k_proj"]["kernel"])}}
    state = mixer.initial_state(config, 1, 0, jnp.float32)
    state |= {"memory": jnp.ones_like(state["memory"])}
    _, after = bind(mixer, config, own)(x, context, state)
    expected = np.broadcast_to(0.5 ** (1 / np.asarray(lives))[None, :, None, None], after["memory"].shape)
    np.testing.assert_allclose(after["memory"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", taking("strength", "kimi_delta"))
def test_the_mean_token_is_written_with_the_strength(kind):
    config, own, x, _ = layer(kind)
    mean, strengths = x[0, 0], jnp.array([0.05, 0.5, 0.8, 0.95])
    own = LINEAR_MIXERS[kind].with_strengths(own, strengths, mean / jnp.sum(mean**2))
    if kind == "rwkv7":
        found = jax.nn.sigmoid(own["rate_bias"])[:, 0]
        assert not own["r_down_proj"]["kernel"].any()
    else:
        found = bind(LINEAR_MIXERS[kind], config, own).gates(x)[1][0, 0]
    np.testing.assert_allclose(found, strengths, rtol=1e-5)


@pytest.mark.parametrize("kind", taking("gate", "rwkv7"))
def test_an_open_gate_passes_the_mean_token_alike_in_all_channels(kind):
    config, own, x, _ = layer(kind)
    mixer, mean = LINEAR_MIXERS[kind], x[0, 0]
    own = bind(mixer, config, mixer.with_open_gate(own, mean / jnp.sum(mean**2), config))
    if kind in ("kimi_delta", "rwkv7"):
        low = own.g_down_proj(x)
        gate = jax.nn.sigmoid(own.g_up_proj(low)) if kind == "kimi_delta" else own.g_up_proj(jax.nn.sigmoid(low))
    else:
        gate = jax.nn.sigmoid(own.g_proj(x)) if kind == "rwkv6" else own.gate(own.g_proj(x))
    is_half = kind in ("kimi_delta", "rwkv6", "fixed_decay")
    np.testing.assert_allclose(gate, np.full((1, 1, 4, 8), 0.5 if is_half else 1.0), rtol=1e-5)


def layer(kind):
    """(config, parameters of one layer of four heads, one token [1,1,32], its context)."""
    teacher, mixer = make_teacher().config, LINEAR_MIXERS[kind].Config()
    config = replace(teacher, mixer=mixer.resolve(teacher), layer_types=(kind,) * teacher.num_layers)
    own = initialize(LINEAR_MIXERS[kind], config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 1, config.hidden_size))
    return config, own, x, TokenContext(None, jnp.ones((1, 1, 4)), jnp.zeros((1, 1, 4)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "expand"),
    [((1, 2, 2, 2), True), ((2, 1, 4, 1), False)],  # fewer states than devices of `tensor`
)
def test_devices_together_measure_what_one_does(shape, expand):
    teacher, mixer = make_teacher(), GatedDeltaNetConfig(expand_kv=expand)
    student = convert(teacher, (mixer.kind,) * 4, mixer, jax.random.key(1))
    batch = make_batch(teacher.config.vocab_size, batch=4)
    parts = LINEAR_MIXERS[mixer.kind].takes(mixer)

    def both(mixers, teacher, batch):
        values = calibration(mixers, teacher, batch, config=student.config, parts=parts, dtype=jnp.float32)
        return values, with_calibration(mixers, values, student.config, parts)

    expected = jax.jit(both)(linear_mixers(student.params), teacher, batch)
    mesh = make_mesh(*shape)

    def on(model):
        return Model(jax.device_put(model.params, param_shardings(model_variables(model.config), mesh)), model.config)

    with jax.set_mesh(mesh):
        placed = linear_mixers(on(student).params), on(teacher), jax.device_put(batch, batch_sharding(mesh))
        actual = jax.jit(both)(*placed)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_run_begins_with_what_it_measures_and_measures_the_same_again(tmp_path, capsys):
    calibrate = {"sequence_length": 32, "batch_size": 4}
    align = stage(tokens=8 * 64, log_every=1) | {"calibrate": calibrate}
    write_config(tmp_path / "config.yaml", write_teacher(tmp_path / "teacher"), align=align)
    config = load_config(tmp_path / "config.yaml", [])
    with Pipeline(config, devices=jax.devices()[:1]) as pipeline:
        pipeline.align()
        values = pipeline._calibration()
        initial = pipeline.models.initial_mixers(values)
        begun = align_loss(
            initial,
            pipeline.models.frozen_teacher,
            first_heldout(pipeline),
            config=pipeline.models.linear_config,
            dtype=jnp.float32,
        )
    summary = read_result(tmp_path / "run" / "align" / "done.json")
    assert summary["calibration"].keys() == {"half_lives", "strengths", "scales"}
    for name, kept in summary["calibration"].items():
        np.testing.assert_allclose(values[name], kept, atol=1e-4)
    np.testing.assert_allclose(begun, summary["heldout_layer_loss_before"], rtol=1e-5)
    assert "align: begins at measured values: half-lives " in capsys.readouterr().out


def first_heldout(pipeline):
    tokens = min(pipeline.config.align.tokens_per_step, pipeline.text.heldout.num_tokens)
    return place_batch(pipeline.text.heldout_batches(64, 8, tokens)[0], pipeline.mesh)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["mixer.kind=deltanet", "align.calibrate={parts: [decay]}"],
         "align.calibrate.parts: deltanet with its settings takes strength, gate, scale; leave out decay"),
        (["mixer.output_gate=false", "align.calibrate={parts: [gate, scale]}"], "leave out gate"),
        (["align.calibrate={parts: [bias]}"], "align.calibrate.parts"),
        (["align.calibrate={parts: []}"], "align.calibrate.parts"),
    ],
)  # fmt: skip
def test_what_a_mixer_does_not_take_is_refused(tmp_path, settings, told):
    path = write_config(tmp_path / "config.yaml", tmp_path / "teacher")
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(path, settings)


def test_rows_that_devices_cannot_share_are_refused_by_name(tmp_path):
    path = write_config(tmp_path / "config.yaml", write_teacher(tmp_path / "teacher"))
    config = load_config(path, ["align.calibrate={batch_size: 3, sequence_length: 64}"])
    with Pipeline(config, devices=jax.devices()[:2]) as pipeline, pytest.raises(TopologyError) as refused:
        pipeline.align()
    assert str(refused.value).startswith("align.calibrate: batch_size=3 does not divide over")
