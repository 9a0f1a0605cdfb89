"""Each family that is registered: read, computed, written back and sharded as transformers has it."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from transformers import AutoConfig, AutoModelForCausalLM

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.families import FAMILIES, config_to_hf, hf_to_config
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import forward
from jaxhybrid.weights.huggingface import load_teacher
from jaxhybrid.weights.names import teacher_tensors
from jaxhybrid.weights.save import save_weights
from tests.families.teachers import SHAPE, TEACHERS, cases, logits_of, make_teacher

TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 48))  # several windows long


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(family, number) -> (the folder of its teacher, its logits in transformers), made once."""
    known = {}

    def make(family, number):
        if (family, number) not in known:
            folder, reference = tmp_path_factory.mktemp(family), make_teacher(family, **TEACHERS[family][number])
            reference.save_pretrained(folder, max_shard_size="100KB")
            known[family, number] = folder, logits_of(reference, TOKENS)
        return known[family, number]

    return make


def test_every_family_is_tested():
    assert TEACHERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("family", "number"), cases("gemma2", "gemma3_text", "olmo3", "phi3"))
def test_logits_equal_transformers(made, family, number):
    folder, expected = made(family, number)
    model = load_teacher(folder)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(forward(model, jnp.asarray(TOKENS)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "number"), cases(*FAMILIES))
def test_written_back_it_is_the_same_model(made, tmp_path, family, number):
    """By transformers, which reads what was written: config and weights, under the family's own names."""
    folder, expected = made(family, number)
    model = load_teacher(folder)
    save_weights(model.params, model.config, tmp_path, tensors=teacher_tensors(model.config))
    no_padding = {"pad_token_id": None}  # the default of some families is beyond this vocabulary
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.config) | no_padding))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    np.testing.assert_allclose(logits_of(again, TOKENS), expected, atol=1e-5, rtol=0)
    assert load_teacher(tmp_path).config == model.config


@pytest.mark.parametrize(("family", "number"), cases("phi3"))
def test_parameters_go_to_their_shards(made, family, number):
    folder, _ = made(family, number)
    whole, mesh = load_teacher(folder), make_mesh(fsdp=4, tensor=2)
    split = load_teacher(folder, mesh=mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(split.params):
        assert isinstance(leaf.sharding, NamedSharding), path
    jax.tree.map(np.testing.assert_array_equal, whole.params, split.params)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_transformers_defaults(family):
    """A config that says nothing but its sizes means the same here and there."""
    bare = {key: SHAPE[key] for key in SHAPE if key not in ("max_position_embeddings", "rms_norm_eps")}
    theirs = json.loads(AutoConfig.for_model(family, **bare).to_json_string(use_diff=False))
    assert hf_to_config({"model_type": family, **bare}) == hf_to_config(theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"surprise": 3}, ("surprise=3", "ignore_config_keys")),
        ({"layer_types": ["full_attention"]}, ("layer_types",)),
        ({"layer_types": ["linear_attention"] * 5}, ("linear_attention",)),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention=True",)),
    ],
)
def test_what_is_not_understood_is_refused_by_name(family, changes, parts):
    with pytest.raises(ConfigError) as error:
        hf_to_config({"model_type": family, **SHAPE, **changes})
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["hidden_act", "hidden_activation"])
def test_an_unknown_activation_is_refused(key):
    (family,) = {"hidden_act": ["phi3"], "hidden_activation": ["gemma3_text"]}[key]
    with pytest.raises(ConfigError, match=f"{key}='relu'"):
        hf_to_config({"model_type": family, **SHAPE, key: "relu"})


def test_a_cap_that_transformers_does_not_heed_is_refused():
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping=50\.0"):
        hf_to_config({"model_type": "gemma3_text", **SHAPE, "attn_logit_softcapping": 50.0})


def test_what_a_family_cannot_say_is_named():
    config = hf_to_config({"model_type": "granite", **SHAPE})
    for changes in ({"norms": "after"}, {"unrotated_layers": (1,)}, {"qk_norm": True}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            config_to_hf(replace(config, **changes))


def test_a_fused_tensor_of_another_size_is_named(made, tmp_path):
    folder, _ = made("phi3", 0)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(WeightsError, match=r"qkv_proj.weight .* shape \[128, 64\], expected \[192, 64\]"):
        load_teacher(tmp_path)
