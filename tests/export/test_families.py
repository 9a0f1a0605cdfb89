"""Exports of every family by the code they carry: a softmax model equals transformers' own, a hybrid equals ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxhybrid.export.folder import export
from jaxhybrid.families import FAMILIES
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.window_attention import WindowAttentionConfig
from jaxhybrid.model.transformer import forward
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_student, load_teacher
from tests.families.teachers import SHAPE, TEACHERS, cases, logits_of, make_teacher

TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (2, 40))
F = "full_attention"


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def test_every_family_is_tested():
    assert TEACHERS.keys() == FAMILIES.keys()


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize(("family", "number"), cases("smollm3"))
def test_a_softmax_export_equals_the_teacher(tmp_path, family, number):
    reference = make_teacher(family, **TEACHERS[family][number])
    reference.save_pretrained(tmp_path / "teacher")
    model = load_teacher(tmp_path / "teacher")
    exported = loaded(export(model, tmp_path / "out", "float32"))
    np.testing.assert_allclose(logits_of(exported, TOKENS), logits_of(reference, TOKENS), atol=2e-5, rtol=0)
    again = load_student(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = torch.from_numpy(TOKENS[:1, :20])
    expected = reference.generate(prompt, use_cache=False, **options)  # beyond a window
    assert exported.generate(prompt, **options).equal(expected)
    assert exported.generate(prompt, cache_implementation="static", **options).equal(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No tokenizer")
@torch.compiler.set_stance("force_eager")  # flex attention would compile for a minute
def test_capped_scores_in_each_implementation(tmp_path):
    make_teacher("gemma2", **TEACHERS["gemma2"][0]).save_pretrained(tmp_path / "teacher")
    folder = export(load_teacher(tmp_path / "teacher"), tmp_path / "out", "float32")
    with pytest.raises(ValueError, match=r'sdpa has no cap of scores.* 2\.0.*"eager" or "flex_attention"'):
        loaded(folder, attn_implementation="sdpa")
    eager = loaded(folder)
    assert eager.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="sdpa has no cap"):
        eager.set_attn_implementation("sdpa")
    expected = logits_of(eager, TOKENS)
    flex = loaded(folder, attn_implementation="flex_attention")
    np.testing.assert_allclose(logits_of(flex, TOKENS), expected, atol=2e-5, rtol=0)
    del eager.config.traits["attention_cap"]
    assert np.abs(logits_of(loaded(folder, config=eager.config), TOKENS) - expected).max() > 1e-2


# Of each trait one family that has it.
RICH = {"gemma2": 0, "gemma3_text": 0, "olmo3": 0, "granite": 0, "smollm3": 1, "qwen3_moe": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.filterwarnings("ignore:mixer.window=")  # sees more than the teacher did
@pytest.mark.parametrize(
    ("family", "mixer"),
    [
        *((family, GatedDeltaNetConfig(rope=True)) for family in RICH),
        ("gemma2", WindowAttentionConfig(window=6, sinks=2)),
    ],
)
def test_a_hybrid_goes_out_and_comes_back(tmp_path, family, mixer):
    """A kept layer keeps its window, a linear one takes what the mixer can; trained form, export and decoding agree."""
    make_teacher(family, **TEACHERS[family][RICH[family]]).save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher")
    make = jax.jit(convert, static_argnums=(1, 2))
    student = make(teacher, (F, F, mixer.kind, F, mixer.kind), mixer, jax.random.key(0))
    expected = forward(student, jnp.asarray(TOKENS))
    exported = loaded(export(student, tmp_path / "out", "float32"))
    np.testing.assert_allclose(logits_of(exported, TOKENS), expected, atol=1e-4, rtol=0)
    again = load_student(tmp_path / "out")
    assert again.config == student.config
    jax.tree.map(np.testing.assert_array_equal, again.params, student.params)
