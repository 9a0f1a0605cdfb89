import numpy as np
import pytest

from jaxhybrid.data import load_vocabulary
from jaxhybrid.errors import DataError


def test_documents_end_with_eos_and_may_begin_with_bos(tokenizer_folder, vocabulary):
    assert [row.tolist() for row in vocabulary.encode(["w0 w1", "w49"])] == [[3, 4, 2], [52, 2]]
    with_bos = load_vocabulary(tokenizer_folder, prepend_bos=True)
    assert with_bos.encode(["w0"])[0].tolist() == [1, 3, 2]
    other_end = load_vocabulary(tokenizer_folder, document_end_token="w5")
    assert other_end.encode(["w0"])[0].tolist() == [3, 8]
    assert len({vocabulary.fingerprint, with_bos.fingerprint, other_end.fingerprint}) == 3


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
