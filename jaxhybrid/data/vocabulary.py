"""The tokenizer of a model folder, reduced to what training needs: documents in, arrays of ids out."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.errors import DataError


@dataclass(frozen=True)
class Vocabulary:
    """A fast tokenizer with the marks put round a document. Special tokens spelled out in the text are recognised."""

    tokenizer: Any  # transformers' tokenizer; the rest of the package uses it for chat templates and decoding
    encoder: Any  # a `tokenizers.Tokenizer` without truncation or padding, whatever the folder's settings
    name: str
    largest_id: int
    end_id: int  # appended to every document
    begin_id: int | None  # put before every document, if any

    @property
    def fingerprint(self) -> str:
        """Changes when any document might be encoded differently."""
        marks = f"{self.begin_id} {self.end_id} "
        return hashlib.blake2b((marks + self.encoder.to_str()).encode(), digest_size=12).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.largest_id < 2**16 else np.uint32)

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Ids of each document, [n] of `dtype`, marks included. Runs on every core (`TOKENIZERS_PARALLELISM=false`
        stops that)."""
        head = [] if self.begin_id is None else [self.begin_id]
        encodings = self.encoder.encode_batch_fast(list(documents), add_special_tokens=False)
        rows = ([*head, *encoding.ids, self.end_id] for encoding in encodings)
        return [np.fromiter(row, self.dtype, len(row)) for row in rows]


def load_vocabulary(
    folder: str | os.PathLike[str],
    vocab_size: int | None = None,
    document_end_token: str | None = None,
    prepend_bos: bool = False,
) -> Vocabulary:
    """Loads the tokenizer of a local folder or hub id; no code of the folder is run.

    vocab_size: rows of the model's embedding; a tokenizer with ids beyond it is refused (DataError, both numbers).
    document_end_token: the token after every document; default the tokenizer's EOS.
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
    largest_id = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest_id >= vocab_size:
        raise DataError(
            f"The tokenizer of {name!r} has ids up to {largest_id}, the model's vocabulary has {vocab_size} rows; "
            "set data.tokenizer to the tokenizer this model was trained with."
        )
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    end = tokenizer.eos_token if document_end_token is None else document_end_token
    begin = tokenizer.bos_token if prepend_bos else None
    if prepend_bos and begin is None:
        raise DataError(f"data.prepend_bos is set but the tokenizer of {name!r} has no BOS token.")
    return Vocabulary(
        tokenizer=tokenizer,
        encoder=encoder,
        name=name,
        largest_id=largest_id,
        end_id=_token_id(encoder, end, name),
        begin_id=None if begin is None else _token_id(encoder, begin, name),
    )


def _plain_config(name: str) -> Any:
    """For an exported hybrid its config without the class of its own, which is code of the folder: transformers would
    warn that it does without. None for others: transformers reads it."""
    from transformers import PreTrainedConfig

    path = Path(name) / "config.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    return PreTrainedConfig.from_dict(table) if table.get("model_type") == "jaxhybrid" else None


def _token_id(encoder: Any, token: str | None, name: str) -> int:
    if token is None:
        raise DataError(f"The tokenizer of {name!r} has no EOS token; set data.document_end_token.")
    index = encoder.token_to_id(token)
    if index is None:
        raise DataError(f"The tokenizer of {name!r} has no token {token!r}; set data.document_end_token to one it has.")
    return index
