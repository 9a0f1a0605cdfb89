"""A whitespace tokenizer over a few words, saved as a model folder, and datasets made of it."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxhybrid.data import load_vocabulary, open_source, open_tokens

WORDS = [f"w{i}" for i in range(50)]


def _save_tokenizer(folder, words=WORDS, form="$A", marks=(), **special):
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in special.items() if v is not None})
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tokenizer():
    """save_tokenizer(folder, words, form, marks, **special tokens): a tokenizer of other words or marks.

    `form` is what it makes of a text by itself, "<s> $A" for one that adds BOS; `marks` are further special tokens;
    None leaves a special token out.
    """
    return _save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return _save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def vocabulary(tokenizer_folder):
    return load_vocabulary(tokenizer_folder)


@pytest.fixture(scope="session")
def dataset(vocabulary, tmp_path_factory):
    """100 different documents of 1 to 40 tokens and their EOS."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(100):
        words = [WORDS[(i + j * (1 + i // 50)) % 50] for j in range(1 + (i * 17) % 40)]
        (folder / f"{i:03}.txt").write_text(" ".join(words))
    return open_tokens(open_source(str(folder / "*.txt")), vocabulary, folder / "cache")
