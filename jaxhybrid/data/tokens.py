"""Documents as one flat file of token ids, made once and mapped into memory afterwards.

A cache folder holds `tokens.bin` (all documents end to end, uint16 or uint32), `lengths.npy` and `hashes.npy` (one
entry per document), `blocks.npy` (checksums of `tokens.bin`) and `meta.json` (with those of the others). Its name is a
hash of source, tokenizer and settings, so another setting is another folder. Any document can be read at random, which
is what makes shuffling and exact resumption cheap.
"""

import hashlib
import json
import os
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from jaxhybrid.checksums import file_checksum, read_result, write_result
from jaxhybrid.data.sources import Source
from jaxhybrid.data.token_file import TokenFile, block_checksums
from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import DamageError, DataError, RunError
from jaxhybrid.files import draft_of, make_folder, storage_errors

FORMAT = 1  # of the cache folder; raised when old folders must not be read
WAY_OUT = "set data.cache_dir to another folder"
GROUP_CHARACTERS = 4_000_000  # text given to the tokenizer in one call: enough to keep every core busy, small in memory

LongDocuments = Literal["split", "cut"]


@dataclass(frozen=True)
class TokenDataset:
    """Documents as token ids. Document i is tokens[starts[i] : starts[i] + lengths[i]]; a view shares `tokens`."""

    tokens: np.ndarray | TokenFile  # flat ids
    starts: np.ndarray  # [documents] int64
    lengths: np.ndarray  # [documents] int64
    hashes: np.ndarray  # [documents] uint64 of the text; pieces of one document share it
    encoding: str  # fingerprint of the tokenizer
    name: str

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, [n]."""
        return self.tokens[self.starts[index] : self.starts[index] + self.lengths[index]]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Of the content: equal on every machine that tokenised the same text the same way, wherever the files lie."""
        digest = hashlib.blake2b(self.encoding.encode(), digest_size=12)
        digest.update(np.ascontiguousarray(self.hashes).tobytes())
        digest.update(np.ascontiguousarray(self.lengths).tobytes())
        return digest.hexdigest()

    def at_least(self, tokens: int) -> "TokenDataset":
        """The documents of `tokens` tokens or more. Raises DataError if there is none."""
        if self.lengths.min() >= tokens:
            return self
        kept = np.flatnonzero(self.lengths >= tokens)
        if not len(kept):
            raise DataError(
                f"No document of {self.name!r} has the {tokens:,} tokens that min_document_tokens asks for; the "
                f"longest has {int(self.lengths.max()):,}. Ask for fewer, or give longer text."
            )
        return self.select(kept, self.name)

    def select(self, documents: np.ndarray, name: str) -> "TokenDataset":
        """The view of the documents with these indices."""
        return replace(
            self,
            starts=self.starts[documents],
            lengths=self.lengths[documents],
            hashes=self.hashes[documents],
            name=name,
        )


def open_tokens(
    source: Source,
    vocabulary: Vocabulary,
    cache_dir: str | os.PathLike[str],
    max_document_tokens: int | None = None,
    long_documents: LongDocuments = "split",
    progress: bool = True,
) -> TokenDataset:
    """Tokens of `source`, from the cache folder or tokenised now (a progress bar on a terminal).

    A document over `max_document_tokens` is split into pieces that count as documents of their own, or cut and the rest
    left out. Processes that do it at the same time may share `cache_dir`; the first to finish is kept.

    A cache that is damaged is made again, with a warning: now, or when the damaged part is first read.

    Raises DataError when the source holds no text or a file is unreadable, and RunError when the cache cannot be
    written.
    """
    settings = [FORMAT, source.fingerprint, vocabulary.fingerprint, max_document_tokens, long_documents]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=12).hexdigest()
    folder = Path(os.path.expanduser(cache_dir)) / key

    def make(again: bool) -> None:
        make_folder(folder.parent, WAY_OUT)
        with storage_errors(folder, WAY_OUT), draft_of(folder) as unfinished:
            unfinished.mkdir()
            _write(unfinished, source, vocabulary, max_document_tokens, long_documents, progress)
            if again:
                _put_into(folder, unfinished)
            else:
                _rename(unfinished, folder)

    def read() -> TokenDataset:
        return _read(folder, source.name, lambda: make(again=True))

    if not folder.is_dir():
        make(again=False)
    try:
        return read()
    except DamageError as error:
        warnings.warn(f"{error}. The text is tokenised again.", stacklevel=2)
        make(again=True)
        return read()


def _rename(unfinished: Path, folder: Path) -> None:
    """Leaves `unfinished` where it is when another process has put the same cache in place first."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _put_into(folder: Path, unfinished: Path) -> None:
    """File by file, so that other processes that read the cache, or mend it as well, find each one at any time."""
    make_folder(folder, WAY_OUT)
    for file in sorted(unfinished.iterdir()):
        file.replace(folder / file.name)


def _write(
    folder: Path,
    source: Source,
    vocabulary: Vocabulary,
    max_tokens: int | None,
    long_documents: LongDocuments,
    progress: bool,
) -> None:
    lengths, hashes = array("q"), array("Q")
    total = 0
    bar = tqdm(desc=f"tokenising {source.name}", unit="tok", unit_scale=True, disable=None if progress else True)
    with bar, open(folder / "tokens.bin", "wb") as file:
        for group in grouped(source.documents()):
            for text, ids in zip(group, vocabulary.encode(group)):
                text_hash = hash_text(text)
                for piece in pieces(ids, max_tokens, long_documents):
                    file.write(piece.tobytes())
                    lengths.append(len(piece))
                    hashes.append(text_hash)
                    total += len(piece)
            bar.update(total - bar.n)
        file.flush()
        os.fsync(file.fileno())
    if not lengths:
        raise DataError(f"Source {source.name!r} holds no text: every document is empty or there is none.")
    np.save(folder / "lengths.npy", np.frombuffer(lengths, np.int64))
    np.save(folder / "hashes.npy", np.frombuffer(hashes, np.uint64))
    np.save(folder / "blocks.npy", block_checksums(folder / "tokens.bin", vocabulary.dtype))
    meta = {
        "format": FORMAT,
        "dtype": vocabulary.dtype.name,
        "tokens": total,
        "documents": len(lengths),
        "source": source.name,
        "tokenizer": vocabulary.name,
        "encoding": vocabulary.fingerprint,
        "max_document_tokens": max_tokens,
        "long_documents": long_documents,
        "checksums": {name: file_checksum(folder / name) for name in ("lengths.npy", "hashes.npy", "blocks.npy")},
    }
    write_result(folder / "meta.json", meta)


def _read(folder: Path, name: str, make_again: Callable[[], None]) -> TokenDataset:
    def checksums() -> np.ndarray:
        return np.load(folder / "blocks.npy")

    def tokens_again() -> np.ndarray:
        make_again()
        return checksums()

    try:
        meta: dict[str, Any] = read_result(folder / "meta.json")
        summed = meta.get("checksums", {})
        for file, expected in summed.items():
            if file_checksum(folder / file) != expected:
                raise ValueError(f"{file} does not match its checksum")
        lengths, hashes = np.load(folder / "lengths.npy"), np.load(folder / "hashes.npy")
        path, dtype = folder / "tokens.bin", np.dtype(meta["dtype"])
        if path.stat().st_size != meta["tokens"] * dtype.itemsize:
            raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes for {meta['tokens']:,} tokens")
        if not (lengths.sum() == meta["tokens"] and len(lengths) == len(hashes) == meta["documents"]):
            raise ValueError("its sizes disagree")
        tokens = TokenFile(path, dtype, checksums() if summed else None, tokens_again)
    except PermissionError as error:
        raise DataError(f"The token cache {folder} cannot be read ({error.strerror}); {WAY_OUT}.") from error
    except (OSError, ValueError, KeyError, RunError) as error:
        raise DamageError(f"The token cache {folder} is damaged ({error})") from error
    if not summed:
        warnings.warn(
            f"The token cache {folder} has no checksums: an earlier version made it. It is read unverified; delete the "
            "folder to have the text tokenised anew.",
            stacklevel=3,
        )
    starts = np.cumsum(lengths) - lengths
    return TokenDataset(tokens, starts, lengths, hashes, meta["encoding"], name)


def grouped(documents: Iterator[str], characters: int = GROUP_CHARACTERS) -> Iterator[list[str]]:
    """Consecutive documents in lists of about `characters`."""
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def pieces(ids: np.ndarray, max_tokens: int | None, long_documents: LongDocuments) -> list[np.ndarray]:
    """One document as the pieces that are kept; all of it when it is short enough."""
    if max_tokens is None or len(ids) <= max_tokens:
        return [ids]
    if long_documents == "cut":
        return [ids[:max_tokens]]
    return [ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens)]


def hash_text(text: str) -> int:
    """64 bits of the text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
