"""Written and read again: every bit, every layer in its place, in one file or many."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxhybrid.errors import WeightsError
from jaxhybrid.families import config_to_hf, student_config_to_hf
from jaxhybrid.model.blueprint import Exact, is_variable
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, forward, model_variables
from jaxhybrid.weights.huggingface import load_student, load_teacher
from jaxhybrid.weights.save import save_weights

BASE = ModelConfig(
    family="llama",
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    norm_eps=1e-5,
    max_position_embeddings=64,
)
PATTERN = (GatedDeltaNetConfig.kind, FULL_ATTENTION, GatedDeltaNetConfig.kind, GatedDeltaNetConfig.kind)
MIXER = GatedDeltaNetConfig(qkv_bias=False, qk_norm=False)
STUDENTS = {
    "plain": dataclasses.replace(BASE, layer_types=PATTERN, mixer=MIXER),
    "all-linear": dataclasses.replace(
        BASE, layer_types=(GatedDeltaNetConfig.kind,) * 4, mixer=MIXER, tie_embeddings=True
    ),
    "all-softmax": BASE,
    "everything": dataclasses.replace(
        BASE,
        family="qwen3",
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
        layer_types=PATTERN,
        mixer=GatedDeltaNetConfig(expand_kv=False, conv_size=4, rope=True, qkv_bias=True, qk_norm=True),
    ),
    "qwen2-no-gate": dataclasses.replace(
        BASE,
        family="qwen2",
        qkv_bias=True,
        layer_types=PATTERN[::-1],
        mixer=GatedDeltaNetConfig(output_gate=False, conv_size=3, qkv_bias=True, qk_norm=False),
    ),
    "mlp-bias": dataclasses.replace(
        BASE, mlp_bias=True, qkv_bias=True, o_bias=True, layer_types=PATTERN, mixer=MIXER
    ),
}  # fmt: skip


def random_params(config, seed=0):
    """Every number different, so that no two tensors or layers can be exchanged unseen."""
    rng = np.random.default_rng(seed)
    specs = model_variables(config)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(0, 0.3, spec.shape), jnp.float32), specs, is_leaf=is_variable
    )


def write(folder, params, config, **options):
    save_weights(params, config, folder, **options)
    hf = student_config_to_hf(config, {"eos_token_id": 2})
    (folder / "config.json").write_text(json.dumps(hf))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_student_round_trip(name, max_shard_bytes, tmp_path):
    config, params = STUDENTS[name], random_params(STUDENTS[name])
    write(tmp_path, params, config, max_shard_bytes=max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    student = load_student(tmp_path)
    assert student.config == config
    assert student.folder == str(tmp_path)
    assert_equal(student.params, params)


def test_names_and_layouts_of_a_linear_layer(tmp_path):
    config = STUDENTS["everything"]
    params = random_params(config)
    save_weights(params, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mixer = jax.device_get(params["mixers"][GatedDeltaNetConfig.kind])
    layer, row = "model.layers.2.linear_attn.", 1  # the second linear layer
    expected = {
        "q_proj.weight": mixer["q_proj"]["kernel"][row].reshape(32, 24).T,
        "k_proj.weight": mixer["k_proj"]["kernel"][row].reshape(32, 12).T,
        "v_proj.weight": mixer["v_proj"]["kernel"][row].reshape(32, 12).T,
        "g_proj.weight": mixer["g_proj"]["kernel"][row].reshape(32, 24).T,
        "a_proj.weight": mixer["a_proj"]["kernel"][row].T,
        "b_proj.weight": mixer["b_proj"]["kernel"][row].T,
        "o_proj.weight": mixer["o_proj"]["kernel"][row].reshape(24, 32).T,
        "q_proj.bias": mixer["q_proj"]["bias"][row].reshape(24),
        "k_proj.bias": mixer["k_proj"]["bias"][row].reshape(12),
        "v_proj.bias": mixer["v_proj"]["bias"][row].reshape(12),
        "o_proj.bias": mixer["o_proj"]["bias"][row],
        "A_log": mixer["A_log"][row],
        "dt_bias": mixer["dt_bias"][row],
        "o_norm.weight": mixer["o_norm"]["scale"][row],
        "q_norm.weight": mixer["q_norm"]["scale"][row],
        "k_norm.weight": mixer["k_norm"]["scale"][row],
        "q_conv.weight": mixer["q_conv"]["taps"][row].reshape(4, 24).T[:, None],
        "k_conv.weight": mixer["k_conv"]["taps"][row].reshape(4, 12).T[:, None],
        "v_conv.weight": mixer["v_conv"]["taps"][row].reshape(4, 12).T[:, None],
    }
    found = {name.removeprefix(layer): value for name, value in tensors.items() if name.startswith(layer)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert {name.split(".")[3] for name in tensors if name.startswith("model.layers.1.")} == {
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_what_we_write(family, tmp_path):
    flags = {"llama": {"mlp_bias": True}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}[family]
    config = dataclasses.replace(BASE, family=family, head_dim=8, **flags)
    params = random_params(config)
    save_weights(params, config, tmp_path, max_shard_bytes=20_000)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert load_teacher(tmp_path).config == config
    reference, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(0, 53, (2, 30))
    expected = reference(reference.dummy_inputs["input_ids"].new_tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(forward(Model(params, config), jnp.asarray(tokens)), expected, atol=1e-4, rtol=0)


def test_bfloat16_keeps_decays_in_float32(tmp_path):
    config = STUDENTS["plain"]
    params = random_params(config)
    write(tmp_path, params, config, dtype=jnp.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    wide = {name.split(".")[-1] for name, value in tensors.items() if value.dtype == np.float32}
    assert wide == {"A_log", "dt_bias"}
    specs = model_variables(config)
    expected = jax.tree.map(
        lambda spec, x: x if isinstance(spec, Exact) else x.astype(jnp.bfloat16).astype(jnp.float32),
        specs,
        params,
        is_leaf=is_variable,
    )
    assert_equal(load_student(tmp_path).params, expected)
    half = load_student(tmp_path, dtype=jnp.bfloat16).params["mixers"][GatedDeltaNetConfig.kind]
    assert half["A_log"].dtype == jnp.float32
    assert half["q_proj"]["kernel"].dtype == jnp.bfloat16


def test_sharded_parameters_are_written_whole(tmp_path):
    config = STUDENTS["plain"]
    params, mesh = random_params(config), make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        write(tmp_path, jax.device_put(params, param_shardings(model_variables(config), mesh)), config)
        student = load_student(tmp_path, mesh=mesh)
    assert student.params["blocks"]["mlp"]["up_proj"]["kernel"].sharding.mesh.size == 8
    assert_equal(student.params, params)


def test_index_and_sizes(tmp_path):
    config = STUDENTS["plain"]
    save_weights(random_params(config), config, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert {path.name for path in tmp_path.iterdir()} == {*files, "model.safetensors.index.json"}
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert sum(len(tensors) for tensors in files.values()) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(v.nbytes for tensors in files.values() for v in tensors.values())
    for tensors in files.values():
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 20_000


def test_a_second_write_leaves_nothing_of_the_first(tmp_path):
    config = STUDENTS["plain"]
    write(tmp_path, random_params(config, 1), config, max_shard_bytes=20_000)
    params = random_params(config, 2)
    write(tmp_path, params, config)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    assert_equal(load_student(tmp_path).params, params)
    write(tmp_path, params, config, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal(load_student(tmp_path).params, params)


def test_a_failed_write_leaves_the_old_weights(tmp_path, monkeypatch):
    config, params = STUDENTS["plain"], random_params(STUDENTS["plain"])
    write(tmp_path, params, config)
    calls = []
    from jaxhybrid.weights import save

    real = save.stream_safetensors

    def full_disk(path, *content):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("No space left on device")
        real(path, *content)

    monkeypatch.setattr(save, "stream_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_weights(random_params(config, 5), config, tmp_path, max_shard_bytes=20_000)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    assert_equal(load_student(tmp_path).params, params)


def test_parameters_of_another_config(tmp_path):
    config = STUDENTS["plain"]
    params = random_params(config)
    other = dataclasses.replace(config, intermediate_size=48)
    with pytest.raises(WeightsError, match=r"down_proj.*\[40, 32\].*\[48, 32\]"):
        save_weights(params, other, tmp_path)
    assert not list(tmp_path.iterdir())
