"""GGUF vocabulary -> tokenizer.json and tokenizer_config.json.

A GGUF file has tokens, merges or scores, and the name of the rule that splits text into words. The rule itself is the
one of the original Hugging Face tokenizer that llama.cpp gave this name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from jaxhybrid.errors import WeightsError
from jaxhybrid.weights.gguf.config import role_ids
from jaxhybrid.weights.gguf.model import OTHER_FILE, GgufModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "▁"  # sentencepiece's


@dataclass(frozen=True)
class Words:
    """How a byte-level vocabulary splits text, and what its original does besides.

    Attributes:
        pattern: one match is one word; None is GPT-2's own.
        digits: every numeral is a word before the rest is split.
        adds_bos: unless the file says otherwise.
        ignore_merges: a word that is a token is taken whole, whether or not merges lead to it.
    """

    pattern: str | None = None
    digits: bool = False
    compose: bool = False  # Unicode NFC first
    adds_bos: bool = False
    ignore_merges: bool = False

    def pre_tokenizer(self) -> Any:
        first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.pattern is not None:
            first.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        return pre_tokenizers.Sequence(
            [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)]
        )


def _pattern(digits: int) -> str:
    """Contractions, letters with one sign before them, up to so many digits, signs, line ends, spaces."""
    number = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


LLAMA3 = Words(_pattern(3), adds_bos=True, ignore_merges=True)
WORDS: Mapping[str, Words] = {
    "gpt-2": Words(),
    "smollm": Words(digits=True),
    "qwen2": Words(_pattern(1), compose=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}


def rebuild_tokenizer(model: GgufModel, length: int) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its tokenizer_config.json; `length` is the model's context.

    Raises:
        WeightsError: the tokenizer is of a kind that is not known, or its lists do not fit together.
    """
    vocabulary = _Vocabulary(model)
    kind = model.setting("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(vocabulary), True
    else:
        raise WeightsError(f"{model.name} has tokenizer.ggml.model={kind!r}; read are gpt2, llama. {OTHER_FILE}")
    roles = {role: vocabulary.tokens[token] for role, token in role_ids(model).items()}
    tokenizer.post_processor = _post_processor(vocabulary, roles, adds_bos)
    special = vocabulary.of_type(UNKNOWN) + vocabulary.of_type(CONTROL)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    # One with spaces in it, as Gemma's runs of them, is looked for where spaces have become pieces.
    added = vocabulary.of_type(USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=SPACE in token) for token in added])
    settings = {f"{role}_token": token for role, token in roles.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": [token for token in special if token not in roles.values()],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        **_chat_template(model),
    }
    return tokenizer, settings


class _Vocabulary:
    """The lists of a file, checked against each other."""

    def __init__(self, model: GgufModel):
        self.model = model
        self.tokens: list[str] = model.settings("tokenizer.ggml.tokens", str)
        self.types: list[int] = model.settings("tokenizer.ggml.token_type", int)
        # Rows of the embedding that the original vocabulary has no token for are named by their number.
        used = role_ids(model).values()
        self.ids = {token: i for i, token in enumerate(self.tokens) if token != f"[PAD{i}]" or i in used}
        if len(self.types) != len(self.tokens):
            raise WeightsError(
                f"{model.name} has {len(self.tokens)} tokens and {len(self.types)} types of tokens. {OTHER_FILE}"
            )
        for i, token in enumerate(self.tokens):
            if self.ids.get(token, i) != i:
                raise WeightsError(
                    f"{model.name} has the token {token!r} twice, as {i} and {self.ids[token]}. {OTHER_FILE}"
                )

    def of_type(self, kind: int) -> list[str]:
        return [token for token, own in zip(self.tokens, self.types) if own == kind and token in self.ids]

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self.model.settings("tokenizer.ggml.merges", str):
            left, _, right = merge.partition(" ")
            if not {left, right, left + right} <= self.ids.keys():
                raise WeightsError(f"{self.model.name} has the merge {merge!r}, not of two tokens to one. {OTHER_FILE}")
            pairs.append((left, right))
        return pairs

    def merges_by_score(self) -> list[tuple[str, str]]:
        """Every way to put a piece together from two others, the piece of the best score first."""
        scores = self.model.settings("tokenizer.ggml.scores", float)
        if len(scores) != len(self.tokens):
            raise WeightsError(f"{self.model.name} has {len(self.tokens)} tokens, {len(scores)} scores. {OTHER_FILE}")
        ranked = sorted(self.of_type(NORMAL), key=lambda token: -scores[self.ids[token]])
        if len({scores[self.ids[token]] for token in ranked}) < 2 < len(ranked):
            raise WeightsError(f"{self.model.name} has one score for all tokens: no order of merges. {OTHER_FILE}")
        cuts = ((token[:cut], token[cut:]) for token in ranked for cut in range(len(token) - 1, 0, -1))
        return [(left, right) for left, right in cuts if left in self.ids and right in self.ids]

    def flag(self, name: str, default: bool) -> bool:
        return self.model.setting(f"tokenizer.ggml.{name}", bool, default)


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.model.setting("tokenizer.ggml.pre", str)
    if name not in WORDS:
        raise WeightsError(
            f"{vocabulary.model.name} splits text by the rule tokenizer.ggml.pre={name!r}; known are "
            f"{', '.join(WORDS)}. {OTHER_FILE}"
        )
    words = WORDS[name]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges(), ignore_merges=words.ignore_merges))
    if words.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.adds_bos


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """Llama 2's kind: pieces with a score, spaces as ▁, bytes for characters that have no piece."""
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise WeightsError(f"{vocabulary.model.name} has a tokenizer that removes spaces, not known. {OTHER_FILE}")
    spaced = next((token for token in vocabulary.of_type(USER_DEFINED) if SPACE in token), None)
    if spaced is not None and vocabulary.flag("add_space_prefix", True):
        raise WeightsError(f"{vocabulary.model.name} has the added token {spaced!r} with a space in it. {OTHER_FILE}")
    unknown = vocabulary.of_type(UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.ids,
            vocabulary.merges_by_score(),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of_type(BYTE)),
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    to_pieces = [normalizers.Replace(" ", SPACE)]
    to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *to_pieces] if prefix else to_pieces)
    tokenizer.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)] if prefix else to_text)
    return tokenizer


def _post_processor(vocabulary: _Vocabulary, roles: Mapping[str, str], adds_bos: bool) -> Any:
    """Puts the begin and end tokens round a text, where the tokenizer does."""
    byte_level = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    before = [roles["bos"]] if vocabulary.flag("add_bos_token", adds_bos) and "bos" in roles else []
    after = [roles["eos"]] if vocabulary.flag("add_eos_token", False) and "eos" in roles else []
    if not before and not after:
        return byte_level
    marks = [(token, vocabulary.ids[token]) for token in {*before, *after}]
    single = [*before, "$A", *after]
    pair = [*single, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=marks)
    return processors.Sequence([byte_level, template])


def _chat_template(model: GgufModel) -> dict[str, Any]:
    """The template; a list of named ones where there are several, as transformers keeps them."""
    key = "tokenizer.chat_template"
    default = {"default": model.setting(key, str)} if key in model.metadata else {}
    others = [name.removeprefix(f"{key}.") for name in model.metadata if name.startswith(f"{key}.")]
    named = default | {name: model.setting(f"{key}.{name}", str) for name in others}
    if named.keys() == {"default"}:
        return {"chat_template": named["default"]}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    return {"chat_template": listed} if listed else {}
