"""The tokenizer of a model folder, reduced to what training needs: documents in, arrays of ids out.

A text begins as the tokenizer by itself begins one (Llama's puts its BOS there, Qwen's nothing), be it a document or a
prompt. A document ends with what ends one in pretraining text. A chat model's EOS is often something else: the end of a
turn.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.errors import DataError

# What ends a document, by the names that tokenizers give it: GPT-2 and Qwen, Llama 3, DeepSeek, Llama 2 and Mistral.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>")
END_OF_TEXT = "end_of_text"  # whichever of them the tokenizer has, as a value of data.document_end_token


@dataclass(frozen=True)
class Vocabulary:
    """A fast tokenizer with the marks put round a document. Special tokens spelled out in the text are recognised."""

    tokenizer: Any  # transformers' tokenizer; the rest of the package uses it for chat templates and decoding
    encoder: Any  # a `tokenizers.Tokenizer` without truncation or padding, whatever the folder's settings
    name: str
    largest_id: int
    end_id: int  # appended to every document
    begin_ids: tuple[int, ...]  # put before every document and every prompt: BOS, or nothing

    @property
    def fingerprint(self) -> str:
        """Changes when any document might be encoded differently."""
        marks = f"{' '.join(map(str, self.begin_ids)) or None} {self.end_id} "
        return hashlib.blake2b((marks + self.encoder.to_str()).encode(), digest_size=12).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.largest_id < 2**16 else np.uint32)

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Ids of each document, [n] of `dtype`, marks included. Runs on every core (`TOKENIZERS_PARALLELISM=false`
        stops that)."""
        encodings = self.encoder.encode_batch_fast(list(documents), add_special_tokens=False)
        rows = ([*self._begun(encoding.ids), self.end_id] for encoding in encodings)
        return [np.fromiter(row, self.dtype, len(row)) for row in rows]

    def prompt(self, text: str, begin: bool = True) -> list[int]:
        """Ids of a text that is to go on: begun as every document is, and nothing after it.

        begin: False takes the text alone, for what is in the middle of one or what a chat template has begun.
        """
        return self.prompts([text], begin)[0]

    def prompts(self, texts: Sequence[str], begin: bool = True) -> list[list[int]]:
        """`prompt` of each text, on every core."""
        encodings = self.encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._begun(encoding.ids) if begin else encoding.ids for encoding in encodings]

    @property
    def beginning(self) -> str:
        """What is put before a text, in words."""
        return self._words(self.begin_ids)

    def describe(self) -> str:
        """What is put round a document, in words."""
        by_itself = _begin_ids(self.encoder)
        told = f"documents begin with {self.beginning} and end with {self._words((self.end_id,))}"
        if self.begin_ids == by_itself:
            return told
        return (
            f"{told} (data.prepend_bos; generate, benchmark and the export begin with {self._words(by_itself)}, as the "
            "tokenizer does by itself)"
        )

    def _begun(self, ids: list[int]) -> list[int]:
        """`ids` behind the beginning, unless the text spells it out, as chat templates do."""
        begin = list(self.begin_ids)
        return ids if ids[: len(begin)] == begin else begin + ids

    def _words(self, ids: tuple[int, ...]) -> str:
        return "".join(self.encoder.id_to_token(index) for index in ids) or "no special token"


def load_vocabulary(
    folder: str | os.PathLike[str],
    vocab_size: int | None = None,
    document_end_token: str | None = END_OF_TEXT,
    prepend_bos: bool | None = None,
) -> Vocabulary:
    """Loads the tokenizer of a local folder or hub id; no code of the folder is run.

    Args:
        vocab_size: rows of the model's embedding. A padding token beyond them is left out, with a warning.
        document_end_token: the token after every document. "end_of_text": the EOS if it is one of END_TOKENS, else the
            special token that is, else the EOS all the same. None: the EOS.
        prepend_bos: put the BOS token before every text, or never. None: as the tokenizer does by itself.

    Raises:
        DataError: there is no such tokenizer or token, or text can give ids beyond `vocab_size`; names both numbers.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    name = os.fspath(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, config=_plain_config(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"Cannot load a tokenizer from {name!r}: {error}") from error
    if not tokenizer.is_fast:
        raise DataError(f"The tokenizer of {name!r} has no tokenizer.json; convert it to a fast one and save it there.")
    description = tokenizer.backend_tokenizer.to_str()
    if vocab_size is not None:
        description = _without_padding_beyond(vocab_size, description, tokenizer, name)
    encoder = Tokenizer.from_str(description)
    largest_id = max(encoder.get_vocab().values())
    if vocab_size is not None and largest_id >= vocab_size:
        raise DataError(
            f"The tokenizer of {name!r} has ids up to {largest_id}, the model's vocabulary has {vocab_size} rows; "
            "set data.tokenizer to the tokenizer this model was trained with."
        )
    encoder.no_truncation()
    encoder.no_padding()
    end = _end_of_text(tokenizer, encoder) if document_end_token == END_OF_TEXT else document_end_token
    begin_ids = _begin_ids(encoder)
    if prepend_bos is not None:
        if prepend_bos and tokenizer.bos_token is None:
            raise DataError(f"data.prepend_bos is set but the tokenizer of {name!r} has no BOS token.")
        begin_ids = (_token_id(encoder, tokenizer.bos_token, name),) if prepend_bos else ()
    return Vocabulary(
        tokenizer=tokenizer,
        encoder=encoder,
        name=name,
        largest_id=largest_id,
        end_id=_token_id(encoder, tokenizer.eos_token if end is None else end, name),
        begin_ids=begin_ids,
    )


def _plain_config(name: str) -> Any:
    """For an exported hybrid its config without the class of its own, which is code of the folder: transformers would
    warn that it does without. None for others: transformers reads it."""
    from transformers import PreTrainedConfig

    path = Path(name) / "config.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    return PreTrainedConfig.from_dict(table) if table.get("model_type") == "jaxhybrid" else None


def _begin_ids(encoder: Any) -> tuple[int, ...]:
    """What the tokenizer by itself puts before a text."""
    alone, marked = (encoder.encode("a", add_special_tokens=marks).ids for marks in (False, True))
    starts = (start for start in range(len(marked)) if marked[start : start + len(alone)] == alone)
    return tuple(marked[: next(starts, 0)])


def _end_of_text(tokenizer: Any, encoder: Any) -> str | None:
    """The token that ends a text in pretraining; None when the EOS does, or nothing better is known."""
    special = {token.content for token in encoder.get_added_tokens_decoder().values() if token.special}
    known = [token for token in END_TOKENS if token in special]
    return None if tokenizer.eos_token in END_TOKENS or not known else known[0]


def _without_padding_beyond(vocab_size: int, description: str, tokenizer: Any, name: str) -> str:
    """A tokenizer's JSON without a padding token whose id is beyond the embedding and that does nothing but pad."""
    token, index = tokenizer.pad_token, tokenizer.pad_token_id
    other_roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    last = max(tokenizer.get_vocab().values())  # removing another one would number those behind it anew
    if index != last or index < vocab_size or token in other_roles:
        return description
    warnings.warn(
        f"The padding token {token!r} (id {index}) of {name!r} is beyond the {vocab_size} rows of the model's "
        "embedding. It is not used here, and text that spells it out is read letter by letter.",
        stacklevel=3,
    )
    table = json.loads(description)
    table["added_tokens"] = [added for added in table["added_tokens"] if added["id"] != index]
    return json.dumps(table)


def _token_id(encoder: Any, token: str | None, name: str) -> int:
    if token is None:
        raise DataError(f"The tokenizer of {name!r} has no EOS token; set data.document_end_token.")
    index = encoder.token_to_id(token)
    if index is None:
        raise DataError(f"The tokenizer of {name!r} has no token {token!r}; set data.document_end_token to one it has.")
    return index
