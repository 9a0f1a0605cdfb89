import hashlib

import numpy as np
import pytest

from jaxhybrid.data import load_vocabulary
from jaxhybrid.errors import DataError

BOS, EOS, W0 = 1, 2, 3


def rows(vocabulary, *documents):
    return [row.tolist() for row in vocabulary.encode(documents)]


# --- what begins a text


@pytest.mark.parametrize("form", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_text_begins_as_the_tokenizer_begins_it(form, save_tokenizer, tmp_path):
    vocabulary = load_vocabulary(save_tokenizer(tmp_path, form=form))
    by_itself = vocabulary.tokenizer("w0 w1").input_ids
    prompt = vocabulary.prompt("w0 w1")
    assert prompt == [id for id in by_itself if id != EOS] == [BOS] * form.startswith("<s>") + [W0, W0 + 1]
    assert rows(vocabulary, "w0 w1", "w0") == [[*prompt, EOS], [*prompt[:-1], EOS]]
    assert vocabulary.prompt("w0 w1", begin=False) == [W0, W0 + 1]
    assert vocabulary.prompt("") == prompt[:-2]


def test_a_beginning_may_be_asked_for_or_left_out(save_tokenizer, tokenizer_folder, tmp_path):
    adds = save_tokenizer(tmp_path, form="<s> $A")
    for folder in (adds, tokenizer_folder):
        for begin, head in ((True, [BOS]), (False, [])):
            vocabulary = load_vocabulary(folder, prepend_bos=begin)
            assert rows(vocabulary, "w0") == [[*head, W0, EOS]]
            assert vocabulary.prompt("w0") == [*head, W0]


def test_a_beginning_that_the_text_spells_out_is_not_doubled(save_tokenizer, tmp_path):
    """Text that a chat template has rendered begins so."""
    vocabulary = load_vocabulary(save_tokenizer(tmp_path, form="<s> $A"))
    assert vocabulary.prompt("<s> w0") == vocabulary.prompt("w0") == [BOS, W0]
    assert rows(vocabulary, "<s> w0", "w0 <s>", "<s>") == [[BOS, W0, EOS], [BOS, W0, BOS, EOS], [BOS, EOS]]


def test_older_runs_keep_their_text_and_its_cache(save_tokenizer, tmp_path):
    """Their config.yaml says document_end_token: null and prepend_bos: false, which meant the EOS and no BOS."""
    folder = save_tokenizer(tmp_path, form="<s> $A", marks=["<|endoftext|>", "<turn>"], eos_token="<turn>")
    vocabulary = load_vocabulary(folder, document_end_token=None, prepend_bos=False)
    assert rows(vocabulary, "w0", "<s> w0") == [[W0, 54], [BOS, W0, 54]]
    content = "None 54 " + vocabulary.encoder.to_str()
    assert vocabulary.fingerprint == hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


# --- what ends a document

# (special tokens beside <s> and </s>, EOS) of well-known tokenizers, and what ends a document for each.
ENDS = {
    "SmolLM2-Instruct": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
    "Qwen2.5-Instruct": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),
    "Qwen2.5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),
    "Llama-3-Instruct": (["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),
    "Llama-3": (["<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>", "<|end_of_text|>"),
    "DeepSeek-R1-Distill": (["<｜end▁of▁sentence｜>", "<|im_end|>"], "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-coder-instruct": (["<｜end▁of▁sentence｜>", "<|EOT|>"], "<|EOT|>", "<｜end▁of▁sentence｜>"),
    "Phi-3": (["</s>", "<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
    "Mistral": (["</s>", "[INST]"], "</s>", "</s>"),
    "OpenHermes-2.5-Mistral": (["</s>", "<|im_end|>"], "<|im_end|>", "</s>"),
    "one without": (["<turn>", "<stop>"], "<stop>", "<stop>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_document_ends_with_the_end_of_text_not_of_a_turn(name, save_tokenizer, tmp_path):
    marks, eos, end = ENDS[name]
    folder = save_tokenizer(tmp_path, marks=marks, eos_token=eos)
    vocabulary = load_vocabulary(folder)
    ids = vocabulary.tokenizer.convert_tokens_to_ids
    assert rows(vocabulary, "w0") == [[W0, ids(end)]]
    assert vocabulary.describe().endswith(f"end with {end}")
    assert rows(load_vocabulary(folder, document_end_token=None), "w0") == [[W0, ids(eos)]]
    assert rows(load_vocabulary(folder, document_end_token=marks[-1]), "w0") == [[W0, ids(marks[-1])]]


def test_a_word_that_looks_like_an_end_of_text_is_none(save_tokenizer, tmp_path):
    folder = save_tokenizer(tmp_path, ["w0", "<|endoftext|>"], marks=["<stop>"], eos_token="<stop>")
    assert rows(load_vocabulary(folder), "w0") == [[W0, W0 + 2]]


def test_an_end_of_text_does_without_an_eos(save_tokenizer, tmp_path):
    folder = save_tokenizer(tmp_path, marks=["<|endoftext|>"], eos_token=None)
    assert rows(load_vocabulary(folder), "w0") == [[W0, 53]]
    with pytest.raises(DataError, match="has no EOS token"):
        load_vocabulary(folder, document_end_token=None)


def test_marks_are_told_and_change_the_fingerprint(save_tokenizer, tmp_path):
    plain, adds = save_tokenizer(tmp_path / "plain"), save_tokenizer(tmp_path / "adds", form="<s> $A")
    asked = "(data.prepend_bos; generate, benchmark and the export begin with {}, as the tokenizer does by itself)"
    variants = {
        "documents begin with no special token and end with </s>": load_vocabulary(plain),
        "documents begin with <s> and end with w5": load_vocabulary(adds, document_end_token="w5"),
        f"documents begin with <s> and end with </s> {asked.format('no special token')}": load_vocabulary(
            plain, prepend_bos=True
        ),
        f"documents begin with no special token and end with </s> {asked.format('<s>')}": load_vocabulary(
            adds, prepend_bos=False
        ),
    }
    for told, vocabulary in variants.items():
        assert vocabulary.describe() == told
    assert len({vocabulary.fingerprint for vocabulary in variants.values()}) == 4


def test_truncation_and_padding_of_the_folder_are_not_applied(save_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    assert load_vocabulary(tmp_path).encode(["w0 w1 w2 w3"])[0].tolist() == [3, 4, 5, 6, 2]


def test_ids_are_uint16_while_they_fit(vocabulary, save_tokenizer, tmp_path):
    assert vocabulary.dtype == np.uint16
    big = load_vocabulary(save_tokenizer(tmp_path, [f"v{i}" for i in range(2**16)]))
    assert big.dtype == np.uint32
    assert big.encode([f"v{2**16 - 1}"])[0].tolist() == [2**16 + 2, 2]


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused_with_both_numbers(tokenizer_folder):
    load_vocabulary(tokenizer_folder, vocab_size=53)
    with pytest.raises(DataError, match=r"ids up to 52, the model's vocabulary has 52 rows"):
        load_vocabulary(tokenizer_folder, vocab_size=52)


def test_a_padding_token_beyond_the_embedding_is_left_out(save_tokenizer, tmp_path):
    """Llama 2 with a <pad> that fine-tuning added and whose row was never made: no text may give its id."""
    folder = save_tokenizer(tmp_path, marks=["<pad>"], pad_token="<pad>")
    assert rows(load_vocabulary(folder, vocab_size=54), "w0 <pad>") == [[W0, 53, EOS]]
    with pytest.warns(UserWarning, match=r"'<pad>' \(id 53\).*beyond the 53 rows"):
        vocabulary = load_vocabulary(folder, vocab_size=53)
    assert vocabulary.largest_id == 52
    assert max(rows(vocabulary, "w0 <pad> w1")[0]) < 53
    assert max(vocabulary.prompt("w0 <pad> w1")) < 53


@pytest.mark.parametrize(
    ("marks", "special"),
    [
        (["<pad>", "<tool>"], {"pad_token": "<pad>"}),  # another one beyond
        (["<pad>"], {}),  # not the padding token
        (["<pad>"], {"pad_token": "<pad>", "unk_token": "<pad>"}),  # what unknown text gives
        (["<pad>"], {"pad_token": "<pad>", "eos_token": "<pad>"}),
    ],
)
@pytest.mark.filterwarnings("ignore:The padding token")
def test_ids_beyond_the_embedding_that_text_can_give_are_refused(marks, special, save_tokenizer, tmp_path):
    with pytest.raises(DataError, match=rf"ids up to {52 + len(marks)}, the model's vocabulary has 53 rows"):
        load_vocabulary(save_tokenizer(tmp_path, marks=marks, **special), vocab_size=53)


def test_what_is_missing_is_named(tmp_path, tokenizer_folder, save_tokenizer):
    with pytest.raises(DataError, match=r"Cannot load a tokenizer from '.*nowhere'"):
        load_vocabulary(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no token '<end>'; set data.document_end_token"):
        load_vocabulary(tokenizer_folder, document_end_token="<end>")
    bare = save_tokenizer(tmp_path / "bare", bos_token=None, eos_token=None)
    with pytest.raises(DataError, match=r"no EOS token; set data.document_end_token"):
        load_vocabulary(bare)
    with pytest.raises(DataError, match="no BOS token"):
        load_vocabulary(bare, document_end_token="w0", prepend_bos=True)
