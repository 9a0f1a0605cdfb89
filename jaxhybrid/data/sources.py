"""Where text comes from: local files, the Hugging Face hub, or the standard library's own help pages.

A source spec is one string, or several read one after the other:

    pydoc                            help topics of the running Python, 0.5 MB of English: text without a network
    hub:ID[:CONFIG[:SPLIT]]          a dataset that `datasets.load_dataset` knows (a local dataset folder too); SPLIT is
                                     `train` unless given, CONFIG may be empty (`hub:ID::validation`)
    PATH or glob                     .parquet, .arrow, .jsonl, .json (text column); .txt (one file is one document).
                                     `**` matches folders; .jsonl, .json, .txt may also end in .gz, .bz2, .zst or .lz4

Rows whose text is null or empty are passed over.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxhybrid.errors import DataError

HUB = "hub:"
PYDOC = "pydoc"
ROWS_PER_READ = 256  # rows of text held in memory at once
READ_BYTES = 1 << 20  # buffer of the line reader
COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}  # what pyarrow's input stream recognises by name


@dataclass(frozen=True)
class Source:
    """Documents that can be read from the start any number of times, always in the same order."""

    name: str  # for messages: the spec as the user wrote it
    fingerprint: str  # changes when the text may have changed (paths, sizes and times of files; the hub's own)
    parts: tuple[Callable[[], Iterator[str | None]], ...]  # one per file or dataset

    def documents(self, part_order: Sequence[int] | None = None) -> Iterator[str]:
        """Non-empty documents, the parts in `part_order` (default: as listed). Memory: one read of one part.

        Raises DataError for an unreadable file, a missing column, or a column that is not text.
        """
        for index in range(len(self.parts)) if part_order is None else part_order:
            for text in self.parts[index]():
                if text:
                    yield text


def open_source(spec: str | Sequence[str], text_column: str = "text", streaming: bool = False) -> Source:
    """Finds what `spec` names, without reading text.

    `streaming` matters to `hub:` only: read over the network as training goes instead of downloading first.
    Raises DataError for an empty spec, a path or glob that matches nothing, an unknown file type, an unknown dataset.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    if not specs or not all(isinstance(s, str) and s.strip() for s in specs):
        raise DataError(f"Text source {spec!r} is empty; give `pydoc`, `hub:ID`, or a path or glob of text files.")
    sources = [_open_one(s, text_column, streaming) for s in specs]
    if len(sources) == 1:
        return sources[0]
    parts = tuple(part for source in sources for part in source.parts)
    return Source(" + ".join(s.name for s in sources), _digest(*(s.fingerprint for s in sources)), parts)


def _open_one(spec: str, text_column: str, streaming: bool) -> Source:
    if spec == PYDOC:
        return _pydoc()
    if spec.startswith(HUB):
        return _hub(spec, text_column, streaming)
    return _files(spec, text_column)


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def _pydoc() -> Source:
    from pydoc_data.topics import topics

    texts = [topics[key] for key in sorted(topics)]
    return Source(PYDOC, _digest(PYDOC, *texts), (lambda: iter(texts),))


# --- the Hugging Face hub ---------------------------------------------------------------------------------------------


def _hub(spec: str, column: str, streaming: bool) -> Source:
    from datasets import load_dataset

    name, config, split = ([*spec.removeprefix(HUB).split(":"), "", ""])[:3]
    if not name or spec.count(":") > 3:
        raise DataError(f"Source {spec!r} is not of the form hub:ID[:CONFIG[:SPLIT]].")
    try:
        data = load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, unknown config or split
        raise DataError(f"Cannot open {spec!r}: {error}") from error
    if data.column_names is not None:
        _require_column(column, data.column_names, spec)

    def read() -> Iterator[str | None]:
        for rows in data.with_format("arrow").iter(batch_size=ROWS_PER_READ):
            yield from _texts(rows, column, spec)

    # Streams have no fingerprint of their own; nothing of theirs is cached.
    fingerprint = _digest(spec, column, "streaming" if streaming else data._fingerprint)
    return Source(spec, fingerprint, (read,))


# --- local files ------------------------------------------------------------------------------------------------------


def _files(spec: str, column: str) -> Source:
    pattern = os.path.expanduser(spec)
    if os.path.isdir(pattern):
        raise DataError(f"Source {spec!r} is a folder; say which files, for example {spec.rstrip('/')}/*.parquet.")
    # A name that exists is meant literally, even when it holds glob characters.
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(p) for p in found if os.path.isfile(p)]
    if not paths:
        hint = "" if glob.has_magic(pattern) else " Known other sources: pydoc, hub:ID[:CONFIG[:SPLIT]]."
        raise DataError(f"No file matches {spec!r} (looked from {os.getcwd()}).{hint}")
    parts = tuple(_file_part(path, column) for path in paths)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return Source(spec, _digest(column, stats), parts)


def _file_part(path: Path, column: str) -> Callable[[], Iterator[str | None]]:
    kind = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    compressed = path.suffix in COMPRESSED
    reader = READERS.get(kind.lower())
    if reader is None or (compressed and kind.lower() in {".parquet", ".arrow"}):
        raise DataError(f"{path} is of no known kind; known: {', '.join(READERS)}, the text kinds also compressed.")

    def read() -> Iterator[str | None]:
        with _readable(path):
            yield from reader(path, column)

    return read


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the file layers raise over a broken file into one DataError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"Cannot read {path}: {error}. Repair or remove the file.") from error


def _read_parquet(path: Path, column: str) -> Iterator[str | None]:
    with pq.ParquetFile(path) as file:
        _require_column(column, file.schema_arrow.names, path)
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=[column]):
            yield from _texts(batch, column, path)


def _read_arrow(path: Path, column: str) -> Iterator[str | None]:
    with pa.memory_map(str(path)) as file:
        # `datasets` writes the stream form; other tools the file form, which begins with this word.
        if file.read(6) == b"ARROW1":
            file.seek(0)
            table = pa.ipc.open_file(file)
            _require_column(column, table.schema.names, path)
            for index in range(table.num_record_batches):
                yield from _texts(table.get_batch(index), column, path)
            return
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        _require_column(column, stream.schema.names, path)
        for batch in stream:
            yield from _texts(batch, column, path)


def _read_json(path: Path, column: str) -> Iterator[str | None]:
    """One object per line, or one list of objects (then the file is read whole)."""
    with io.BufferedReader(pa.input_stream(str(path), compression="detect"), READ_BYTES) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith(b"["):
                rows = json.loads(line + file.read())
                for index, row in enumerate(rows):
                    yield _field(row, column, f"{path} item {index}")
                return
            yield _field(json.loads(line), column, f"{path} line {number}")


def _read_text(path: Path, column: str) -> Iterator[str | None]:
    with pa.input_stream(str(path), compression="detect") as file:
        yield file.read().decode("utf-8")


READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".txt": _read_text,
}


def _require_column(column: str, existing: Sequence[str], where: Any) -> None:
    if column not in existing:
        names = ", ".join(map(repr, existing))
        raise DataError(f"{where} has no column {column!r}; it has {names}. Set data.text_column.")


def _field(row: Any, column: str, where: str) -> str | None:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not an object with a field {column!r}.")
    _require_column(column, list(row), where)
    if row[column] is not None and not isinstance(row[column], str):
        raise DataError(f"{where}: field {column!r} is {row[column]!r:.60}, not text. Set data.text_column.")
    return _whole_characters(row[column]) if row[column] else None


def _whole_characters(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes; it becomes the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _texts(rows: Any, column: str, where: Any) -> list[str | None]:
    """The text column of an arrow batch or table as Python strings."""
    _require_column(column, rows.schema.names, where)
    values = rows.column(column)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{where}: column {column!r} holds {kind}, not text. Set data.text_column.")
    return values.to_pylist()
