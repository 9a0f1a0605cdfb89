"""Teachers with experts: layouts of their files, published sizes, and what is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.families import config_to_hf, hf_to_config
from jaxhybrid.model.blueprint import count_active, count_parameters
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import forward, model_variables
from jaxhybrid.weights.huggingface import load_teacher
from tests.families.teachers import SHAPE, TEACHERS, logits_of, make_teacher

QWEN3_30B = {
    "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize(("hf", "all_", "active"), [(QWEN3_30B, 30.5, 3.3), (MIXTRAL_8X7B, 46.7, 12.9)])
def test_published_sizes(hf, all_, active):
    """In billions, as the model card of Qwen3-30B-A3B and arXiv 2401.04088 have them."""
    config = hf_to_config(hf)
    declared = model_variables(config)
    assert round(count_parameters(declared) / 1e9, 1) == all_
    assert count_active(declared, config) / 1e9 == pytest.approx(active, abs=0.06)
    assert hf_to_config(config_to_hf(config)) == config


@pytest.mark.parametrize(("family", "number"), [("mixtral", 0), ("qwen3_moe", 0)])
def test_one_tensor_of_all_experts_is_read_too(tmp_path, family, number):
    """The form that transformers 5 has in memory; also straight to shards."""
    reference = make_teacher(family, **TEACHERS[family][number] | {"num_hidden_layers": 2})
    apart, together = tmp_path / "apart", tmp_path / "together"
    reference.save_pretrained(apart)
    reference.save_pretrained(together, save_original_format=False)
    whole = load_teacher(apart)
    split = load_teacher(together, mesh=make_mesh(fsdp=4, tensor=2))
    jax.tree.map(np.testing.assert_array_equal, split.params, whole.params)
    kernel = split.params["blocks"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 6, whole.config.experts.width // 2, 16)
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 24))
    np.testing.assert_allclose(forward(whole, jnp.asarray(tokens)), logits_of(reference, tokens), atol=1e-4, rtol=0)

    config = json.loads((together / "config.json").read_text())
    (together / "config.json").write_text(json.dumps(config | {"num_local_experts": 12}))
    with pytest.raises(WeightsError, match=r"mlp.experts.gate_up_proj .* shape \[6, \d+, 64\], expected \[12, \d+, 64"):
        load_teacher(together)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, ("decoder_sparse_step=2", "layers 0, 2, 4 a dense MLP")),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ("mlp_only_layers=[1]", "layers 1 a dense MLP")),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 5}, ("num_experts=4", "num_local_experts=5")),
        ("qwen3_moe", {"num_experts": 0}, ("num_experts=0",)),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, ("5 of 4 experts",)),
        ("qwen3_moe", {"norm_topk_prob": 1.5}, ("norm_topk_prob=1.5",)),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, ("shared_expert_intermediate_size=8",)),
        ("mixtral", {"num_local_experts": True}, ("num_local_experts=True",)),
        ("mixtral", {"norm_topk_prob": True}, ("norm_topk_prob=True",)),
        ("qwen2_moe", {}, ("'qwen2_moe'", "qwen3_moe")),
    ],
)
def test_refused_by_name(family, changes, parts):
    with pytest.raises(ConfigError) as error:
        hf_to_config({"model_type": family, **SHAPE, **changes})
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_either_name_of_the_number_of_experts():
    old, new = (
        hf_to_config({"model_type": "qwen3_moe", **SHAPE, key: 16}) for key in ("num_experts", "num_local_experts")
    )
    assert old == new
    assert old.experts.count == 16
