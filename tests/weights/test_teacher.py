"""Every kind of teacher against transformers' own torch model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import AutoModelForCausalLM

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.blueprint import is_variable
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import forward, model_variables
from jaxhybrid.weights import huggingface
from jaxhybrid.weights.huggingface import load_teacher
from tests.families.test_config import PASSED_OVER
from tests.weights.conftest import CLASSES, make_torch_model

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
MSCALE = {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16, "beta_slow": 2}


def rope(kind, theta=1000.0, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


VARIANTS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-attention-bias": {"attention_bias": True},
    "llama-mlp-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-head-dim": {"head_dim": 24, "num_key_value_heads": 1},
    "llama-ungrouped": {"num_key_value_heads": None},
    "llama-linear": rope("linear", factor=3.0),
    "llama-dynamic": rope("dynamic", factor=4.0),
    "llama-llama3": rope("llama3", theta=500.0, factor=8.0, **LLAMA3),
    "llama-yarn": rope("yarn", **YARN),
    "llama-yarn-mscale": rope("yarn", **YARN, **MSCALE),
    "llama-yarn-attention-factor": rope("yarn", **YARN, attention_factor=1.3),
    "mistral": {"sliding_window": None},
    "mistral-head-dim": {"sliding_window": None, "head_dim": 24, **rope("default", theta=1e6)},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True, **rope("default", theta=1e6)},
    "qwen2-yarn": rope("yarn", **YARN),
    "qwen3": {"head_dim": 32},
    "qwen3-bias": {"head_dim": 16, "attention_bias": True},
    "qwen3-yarn": {"head_dim": 32, **rope("yarn", **YARN)},
}


def logits(model, tokens, **options):
    return np.asarray(forward(model, jnp.asarray(tokens), **options))


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def random_tokens(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, 101, (rows, length))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, saved):
    reference = make_torch_model(name.split("-")[0], **VARIANTS[name])
    model = load_teacher(saved(reference))
    length = 96 if "rope_parameters" in VARIANTS[name] else 40  # beyond max_position_embeddings, where rules extend
    tokens = random_tokens(2, length)
    expected = torch_logits(reference, tokens)
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-4, rtol=0)


def test_a_window_acts_from_the_text_that_is_longer(saved):
    """A token of Mistral sees `sliding_window` tokens, itself among them."""
    tokens = random_tokens(1, 64)
    expected = torch_logits(make_torch_model("mistral", sliding_window=None), tokens)
    assert (torch_logits(make_torch_model("mistral", sliding_window=64), tokens) == expected).all()
    acting = make_torch_model("mistral", sliding_window=63)
    assert (torch_logits(acting, tokens) != expected).any()
    np.testing.assert_allclose(
        logits(load_teacher(saved(acting)), tokens), torch_logits(acting, tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("family", CLASSES)
def test_keys_that_are_passed_over_do_nothing_in_transformers(family):
    tokens = random_tokens(1, 40)
    without, with_them = (make_torch_model(family, **keys) for keys in ({}, PASSED_OVER))
    assert with_them.config.dual_chunk_attention_config  # they did arrive
    assert (torch_logits(with_them, tokens) == torch_logits(without, tokens)).all()


def test_dynamic_rope_within_the_original_length(saved):
    reference = make_torch_model(**rope("dynamic", factor=4.0))
    tokens = random_tokens(1, 20)
    np.testing.assert_allclose(
        logits(load_teacher(saved(reference)), tokens), torch_logits(reference, tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "legacy",
    [
        {"rope_theta": 700.0, "rope_scaling": None},
        {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 700.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}},
        {"rope_theta": 700.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
         "original_max_position_embeddings": 32},
        {},
    ],
)  # fmt: skip
def test_older_rope_keys(legacy, llama_folder):
    path = llama_folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | legacy))
    reference = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokens = random_tokens(1, 96)
    np.testing.assert_allclose(
        logits(load_teacher(llama_folder), tokens), torch_logits(reference, tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_and_shards(dtype, saved):
    folder = saved(make_torch_model("qwen3", head_dim=16).to(dtype), max_shard_size="60KB")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(list(folder.glob("*.safetensors"))) > 2
    tokens = random_tokens(2, 30)
    model = load_teacher(folder)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"float32"}
    np.testing.assert_allclose(logits(model, tokens), torch_logits(reference, tokens), atol=1e-4, rtol=0)
    if dtype == torch.bfloat16:
        half = load_teacher(folder, dtype=jnp.bfloat16)
        for whole, kept in zip(jax.tree.leaves(model.params), jax.tree.leaves(half.params)):
            assert kept.dtype == jnp.bfloat16
            np.testing.assert_array_equal(whole, kept.astype(jnp.float32))


def test_parameters_go_to_their_shards(saved):
    folder = saved(make_torch_model("qwen2"))
    whole, mesh = load_teacher(folder), make_mesh(fsdp=8)
    sharded = load_teacher(folder, mesh=mesh)
    expected = param_shardings(model_variables(whole.config), mesh)
    assert jax.tree.map(lambda x: x.sharding, sharded.params) == expected
    assert sharded.params["blocks"]["mlp"]["gate_proj"]["kernel"].addressable_shards[0].data.shape == (3, 8, 88)
    jax.tree.map(np.testing.assert_array_equal, whole.params, jax.device_get(sharded.params))


def test_a_tree_of_shardings_also_over_layers_and_heads(saved):
    """Any sharding may be asked for, the layer axis included."""
    folder = saved(make_torch_model(num_hidden_layers=4))
    whole, mesh = load_teacher(folder), make_mesh(fsdp=2, data=4)

    def sharding(spec):
        axes = {"layers": "data", "heads": "fsdp"}
        return NamedSharding(mesh, P(*(axes.get(axis) for axis in spec.out_sharding)))

    shardings = jax.tree.map(sharding, model_variables(whole.config), is_leaf=is_variable)
    sharded = load_teacher(folder, shardings=shardings)
    assert sharded.params["mixers"]["full_attention"]["q_proj"]["kernel"].addressable_shards[0].data.shape == (
        1,
        64,
        2,
        16,
    )
    jax.tree.map(np.testing.assert_array_equal, whole.params, jax.device_get(sharded.params))
    with pytest.raises(ConfigError, match="Both mesh and shardings"):
        load_teacher(folder, mesh=mesh, shardings=shardings)


@pytest.mark.parametrize(("shape", "share"), [({"fsdp": 8}, 1 / 8), ({"fsdp": 2, "data": 4}, 1 / 2)])
def test_only_the_shards_of_a_process_are_read_and_each_once(saved, monkeypatch, shape, share):
    """A device that keeps an eighth of a leaf makes an eighth of it on the host; copies of a part are made of one."""
    folder = saved(make_torch_model())
    made = []

    class Spy:
        def __getattr__(self, name):
            return getattr(np, name)

        def empty(self, *arguments):
            made.append(np.empty(*arguments))
            return made[-1]

    monkeypatch.setattr(huggingface, "np", Spy())
    params = load_teacher(folder, mesh=make_mesh(**shape)).params
    parts = [int(leaf.size * share) for leaf in jax.tree.leaves(params) for _ in range(int(1 / share))]
    assert sorted(part.size for part in made) == sorted(parts)
