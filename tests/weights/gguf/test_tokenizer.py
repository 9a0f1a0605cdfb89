"""Tokenizers rebuilt from a GGUF file: token ids against transformers' own classes and sentencepiece."""

import io
import json

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from jaxhybrid.data.vocabulary import load_vocabulary
from jaxhybrid.errors import WeightsError
from jaxhybrid.weights.gguf.model import open_gguf
from jaxhybrid.weights.gguf.tokenizer import rebuild_tokenizer
from tests.tiny import TEXT
from tests.weights.gguf.make import MIXED, Draft, byte_level_vocabulary

TEXTS = [
    "The gated delta rule updates a state of fixed size.",
    "anna has the number 37 and likes the anna. bert has 074",
    "Straße, naïve, Ελληνικά, русский, 日本語のテキスト, العربية, हिन्दी, 🙂👩‍👩‍👧 e\u0301 ½ ٣ \u200b\ufeff",
    "def f(x):\n\treturn {'a': x ** 2, \"b\": [i for i in range(x)]}  # comment\n\n\n    pass\r\n",
    "It's they'll I'm WE'VE don't; \"quoted\" -- dash - 100% $3.50 1,234,567.89 2024-01-31 0x1F 3rd a1b2",
    "",
    " ",
    "   leading and  inner   and trailing   ",
    "\n\n\n",
    "<|turn|>user\nhi<|end|> there <tool>x<|begin|><|tu",
    "a" * 100,
    "\x00\x01\x7f control",
]


@pytest.fixture
def rebuild(tmp_path):
    def build(vocabulary):
        path = Draft("llama", vocabulary, {}).write(tmp_path / "vocabulary.gguf")
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        backend, settings = rebuild_tokenizer(open_gguf(str(path)), 64)
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return AutoTokenizer.from_pretrained(folder)

    return build


def original(vocabulary, pre_tokenizer, **options):
    """A byte-level tokenizer put together in the library by hand."""
    tokens = vocabulary["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in vocabulary["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>", "<｜bar｜>"])
    tokenizer.add_tokens(["<tool>"])
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def qwen2_ids(vocabulary):
    """The class that transformers reads Qwen2's own files with."""
    merges = [tuple(merge.split(" ")) for merge in vocabulary["tokenizer.ggml.merges"]]
    ids = {token: i for i, token in enumerate(vocabulary["tokenizer.ggml.tokens"])}
    tokenizer = Qwen2Tokenizer(vocab=ids, merges=merges, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|turn|>", "<｜bar｜>"]})
    tokenizer.add_tokens(["<tool>"])
    return lambda text: tokenizer(text).input_ids


def llama3_ids(vocabulary):
    """The pattern by which transformers converts Llama 3's tiktoken file."""
    split = pre_tokenizers.Split(Regex(TikTokenConverter().pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return original(vocabulary, pre_tokenizers.Sequence([split, level]), ignore_merges=True)


def gpt2_ids(vocabulary):
    return original(vocabulary, pre_tokenizers.ByteLevel(add_prefix_space=False))


def smollm_ids(vocabulary):
    digits = pre_tokenizers.Digits(individual_digits=True)
    return original(vocabulary, pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


@pytest.mark.parametrize(
    ("pre", "reference"),
    [("gpt-2", gpt2_ids), ("smollm", smollm_ids), ("qwen2", qwen2_ids), ("llama-bpe", llama3_ids)],
)
def test_byte_level_ids(pre, reference, rebuild):
    vocabulary = byte_level_vocabulary(pre)
    tokenizer, expected = rebuild(vocabulary), reference(vocabulary)
    for text in (MIXED, *TEXTS):
        assert tokenizer(text).input_ids == expected(text), text
        if pre != "qwen2":  # which composes e and its accent first
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer(TEXTS[9]).input_ids, skip_special_tokens=True) == "user\nhi there <tool>x<|tu"


def test_the_rules_for_words_differ_on_these_texts():
    vocabulary = byte_level_vocabulary("qwen2")
    references = (gpt2_ids, smollm_ids, qwen2_ids, llama3_ids)
    assert len({str([reference(vocabulary)(text) for text in (MIXED, *TEXTS)]) for reference in references}) == 4


def test_tokens_and_roles(rebuild):
    vocabulary = byte_level_vocabulary("qwen2")
    tokenizer = rebuild(vocabulary)
    tokens = vocabulary["tokenizer.ggml.tokens"]
    assert tokens[-1] == "[PAD511]"
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens[:495])}  # rows without a token are none
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|end|>")
    assert tokenizer.unk_token is None
    assert sorted(tokenizer.all_special_ids) == [490, 491, 492, 493]
    assert tokenizer("[PAD511]").input_ids != [511]
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<|turn|>user: hi"
    assert tokenizer.model_max_length == 64


def test_a_file_without_roles_or_template(rebuild):
    vocabulary = byte_level_vocabulary("qwen2")
    for name in ("bos_token_id", "padding_token_id", "add_bos_token"):
        del vocabulary[f"tokenizer.ggml.{name}"]
    del vocabulary["tokenizer.chat_template"]
    tokenizer = rebuild(vocabulary)
    assert tokenizer.bos_token is tokenizer.pad_token is tokenizer.chat_template is None


def test_a_filled_up_row_that_has_a_role_is_a_token(rebuild):
    tokenizer = rebuild(byte_level_vocabulary("qwen2") | {"tokenizer.ggml.padding_token_id": 511})
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD511]", 511)
    assert len(tokenizer.get_vocab()) == 496


def test_named_chat_templates(rebuild):
    vocabulary = byte_level_vocabulary("qwen2") | {
        "tokenizer.chat_templates": ["tools"],
        "tokenizer.chat_template.tools": "T {{ messages[0]['content'] }}",
    }
    tokenizer = rebuild(vocabulary)
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<|turn|>user: hi"
    assert tokenizer.apply_chat_template(talk, chat_template="tools", tokenize=False) == "T hi"


@pytest.mark.parametrize(
    ("pre", "flags", "before", "after"),
    [
        ("qwen2", {}, [], []),
        ("qwen2", {"add_bos_token": True}, [490], []),
        ("qwen2", {"add_eos_token": True}, [], [491]),
        ("llama-bpe", {}, [490], []),  # as llama.cpp and the original, where the file does not say
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("llama-bpe", {"add_eos_token": True}, [490], [491]),
    ],
)
def test_tokens_put_round_a_text(pre, flags, before, after, rebuild):
    vocabulary = byte_level_vocabulary(pre)
    del vocabulary["tokenizer.ggml.add_bos_token"]
    tokenizer = rebuild(vocabulary | {f"tokenizer.ggml.{name}": value for name, value in flags.items()})
    plain = tokenizer("anna", add_special_tokens=False).input_ids
    assert tokenizer("anna").input_ids == [*before, *plain, *after]
    assert tokenizer("anna", "bert").input_ids.count(490) == 2 * len(before)


def test_llama3_takes_a_word_that_is_a_token_whole(rebuild):
    vocabulary = byte_level_vocabulary("llama-bpe")
    word = next(t for t in vocabulary["tokenizer.ggml.tokens"] if len(t) > 3 and t.isascii() and t.isalpha())
    merges = [merge for merge in vocabulary["tokenizer.ggml.merges"] if merge.replace(" ", "") != word]
    vocabulary["tokenizer.ggml.merges"] = merges
    assert rebuild(vocabulary).tokenize(word) == [word]
    assert rebuild(vocabulary | {"tokenizer.ggml.pre": "qwen2"}).tokenize(word) != [word]


def test_training_reads_it(rebuild, tmp_path):
    rebuild(byte_level_vocabulary("llama-bpe"))
    vocabulary = load_vocabulary(tmp_path / "tokenizer", 512)
    assert vocabulary.largest_id == 494
    assert vocabulary.encode(["<|turn|>"])[0].tolist() == [492, 491]


# --- sentencepiece


@pytest.fixture(scope="module")
def pieces():
    """A model trained with the settings of Llama's."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(". ") + TEXTS[:5]),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def sentencepiece_vocabulary(pieces, **changes):
    """What llama.cpp's converter writes for it."""
    count = range(pieces.get_piece_size())
    kinds = (("is_unknown", 2), ("is_control", 3), ("is_unused", 5), ("is_byte", 6))
    types = [next((kind for name, kind in kinds if getattr(pieces, name)(i)), 1) for i in count]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in count],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in count],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def test_sentencepiece_ids(pieces, rebuild):
    tokenizer = rebuild(sentencepiece_vocabulary(pieces))
    words = "".join(TEXT.split()).replace(".", "")
    odd = [words[i : i + 40] + "  " + words[i + 3 : i + 20] for i in range(0, 300, 7)]
    for text in [*TEXTS, *odd, "d\u0303 \u2581 x"]:
        expected = pieces.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == expected, text
        assert tokenizer.decode(expected) == pieces.decode(expected)
        assert tokenizer(text).input_ids == [1, *expected]
    assert any(pieces.is_byte(i) for i in pieces.encode(TEXTS[11]))
    assert tokenizer("a</s>").input_ids[-1] == 2
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]


def test_sentencepiece_without_the_space_before(pieces, rebuild):
    tokenizer = rebuild(sentencepiece_vocabulary(pieces, **{"tokenizer.ggml.add_space_prefix": False}))
    assert tokenizer.decode(tokenizer("anna has", add_special_tokens=False).input_ids) == "anna has"
    assert not tokenizer.tokenize("anna")[0].startswith("\u2581")


def test_an_added_token_with_a_space_is_refused(pieces, rebuild):
    vocabulary = sentencepiece_vocabulary(pieces)
    vocabulary["tokenizer.ggml.token_type"][vocabulary["tokenizer.ggml.tokens"].index("\u2581h")] = 4
    with pytest.raises(WeightsError, match="'\u2581h' with a space"):
        rebuild(vocabulary)


def test_added_runs_of_spaces_without_the_space_before(pieces, rebuild):
    """As Gemma has them: the longest one is taken before pieces are looked for, and gives its spaces back."""
    vocabulary = sentencepiece_vocabulary(pieces, **{"tokenizer.ggml.add_space_prefix": False})
    first, text = len(vocabulary["tokenizer.ggml.tokens"]), f"anna{' ' * 12}has{' ' * 13}a number"
    for run in ("\u2581" * 12, "\u2581" * 13):
        vocabulary["tokenizer.ggml.tokens"].append(run)
        vocabulary["tokenizer.ggml.token_type"].append(4)
        vocabulary["tokenizer.ggml.scores"].append(-1000.0)
    tokenizer = rebuild(vocabulary)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [i for i in ids if i >= first] == [first, first + 1]
    assert tokenizer.decode(ids) == text


def test_scores_that_order_nothing_are_refused(pieces, rebuild):
    count = pieces.get_piece_size()
    with pytest.raises(WeightsError, match="one score for all tokens"):
        rebuild(sentencepiece_vocabulary(pieces, **{"tokenizer.ggml.scores": [-1000.0] * count}))
    with pytest.raises(WeightsError, match=f"{count} tokens, 2 scores"):
        rebuild(sentencepiece_vocabulary(pieces, **{"tokenizer.ggml.scores": [0.0, -1.0]}))
    with pytest.raises(WeightsError, match="removes spaces"):
        rebuild(sentencepiece_vocabulary(pieces, **{"tokenizer.ggml.remove_extra_whitespaces": True}))


def test_the_written_tokenizer_has_no_hole(pieces, rebuild, tmp_path):
    rebuild(sentencepiece_vocabulary(pieces))
    vocabulary = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(420))
