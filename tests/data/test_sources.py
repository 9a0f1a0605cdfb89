"""What can be read, in which order, and what is refused."""

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxhybrid.data import open_source
from jaxhybrid.errors import DataError

ROWS = [{"text": "alpha", "n": 1}, {"text": None, "n": 2}, {"text": "", "n": 3}, {"text": "beta\ngamma", "n": 4}]
TEXTS = ["alpha", "beta\ngamma"]


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_arrow(path, file_form):
    table = pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_file if file_form else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table)


JSONL = "\n".join(json.dumps(row) for row in ROWS)
WRITERS = {
    "a.parquet": write_parquet,
    "a.arrow": lambda path: write_arrow(path, False),
    "b.arrow": lambda path: write_arrow(path, True),
    "a.jsonl": lambda path: path.write_text(JSONL),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL.encode())),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(JSONL.encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.compress(JSONL.encode(), "zstd", asbytes=True)),
    "a.json": lambda path: path.write_text(JSONL),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "one_line_list.json": lambda path: path.write_text(json.dumps(ROWS)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_documents(name, tmp_path):
    WRITERS[name](tmp_path / name)
    source = open_source(str(tmp_path / name))
    assert list(source.documents()) == TEXTS
    assert list(source.documents()) == TEXTS  # again from the start


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert list(open_source(str(tmp_path / "a.txt")).documents()) == ["one\n\ntwo\n"]


def test_a_glob_reads_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    assert list(open_source(str(tmp_path / "*.txt")).documents()) == ["a.txt", "b.txt"]
    assert set(open_source(str(tmp_path / "**/*.txt")).documents()) == {"a.txt", "b.txt", "deep/c.txt"}


def test_a_name_with_glob_characters_is_found_literally(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert list(open_source(str(tmp_path / "a[1].txt")).documents()) == ["x"]


def test_several_sources_follow_one_another(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("last")
    source = open_source([str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")])
    assert list(source.documents()) == [*TEXTS, "last"]
    assert list(source.documents([1, 0])) == ["last", *TEXTS]


def test_pydoc_is_there_without_files():
    documents = list(open_source("pydoc").documents())
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_by_folder(tmp_path, monkeypatch, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "train-00000.parquet")
    write_parquet(folder / "validation-00000.parquet", [{"text": "held"}])
    train = open_source(f"hub:{folder}", streaming=streaming)
    assert list(train.documents()) == TEXTS
    assert list(open_source(f"hub:{folder}::validation", streaming=streaming).documents()) == ["held"]
    assert open_source(f"hub:{folder}", streaming=streaming).fingerprint == train.fingerprint
    with pytest.raises(DataError, match=r"no column 'body'; it has 'text'"):
        list(open_source(f"hub:{folder}", "body", streaming).documents())
    with pytest.raises(DataError, match="nosplit"):
        open_source(f"hub:{folder}::nosplit", streaming=streaming)


def test_the_fingerprint_follows_content_column_and_order(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(JSONL)
    a, b = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    prints = {open_source([a, b]).fingerprint, open_source([b, a]).fingerprint, open_source(a, "n").fingerprint}
    before = open_source(a).fingerprint
    assert before == open_source(a).fingerprint
    (tmp_path / "a.jsonl").write_text(JSONL + "\n" + json.dumps({"text": "more"}))
    assert len({*prints, before, open_source(a).fingerprint}) == 5


@pytest.mark.parametrize("spec", ["", "  ", [], [""]])
def test_an_empty_spec_is_refused(spec):
    with pytest.raises(DataError, match="is empty; give"):
        open_source(spec)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"No file matches '.*none\.parquet'"):
        open_source(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match=r"No file matches '.*\*\.parquet'"):
        open_source(str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match=r"is a folder; say which files"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"Cannot open 'hub:nobody/nothing'"):
        open_source("hub:nobody/nothing")
    with pytest.raises(DataError, match="not of the form"):
        open_source("hub:a:b:c:d")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.parquet.gz"])
def test_an_unknown_kind_is_refused(name, tmp_path):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"of no known kind; known: \.parquet"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", [name for name in WRITERS if "list" not in name])
def test_a_missing_column_names_the_existing_ones(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=r"no column 'body'; it has 'text', 'n'. Set data.text_column"):
        list(open_source(str(tmp_path / name), "body").documents())


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_that_is_not_text_is_refused(name, tmp_path):
    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=r"'n' (holds int64|is 1), not text"):
        list(open_source(str(tmp_path / name), "n").documents())


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "list.json", "a.txt"])
def test_a_broken_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"\xff\xfe not what it says")
    with pytest.raises(DataError, match=rf"Cannot read .*{name}"):
        list(open_source(str(tmp_path / name)).documents())


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"Cannot read .*a\.parquet"):
        list(open_source(str(tmp_path / "a.parquet")).documents())


def test_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n"y"\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is a str, not an object"):
        list(open_source(str(tmp_path / "a.jsonl")).documents())
