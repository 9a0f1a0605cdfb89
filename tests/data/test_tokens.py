import json
import os
import warnings

import numpy as np
import pytest

import jaxhybrid.data.tokens as tokens_module
from jaxhybrid.data import load_vocabulary, open_source, open_tokens, token_file
from jaxhybrid.errors import DataError, RunError
from tests.harms import harms

DOCUMENTS = ["w0 w1 w2", "w3", "", "w4 w5 w6 w7 w8 w9"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return open_source(str(path))


def documents(dataset):
    return [dataset.document(i).tolist() for i in range(len(dataset))]


def test_documents_become_one_flat_file(source, vocabulary, tmp_path):
    dataset = open_tokens(source, vocabulary, tmp_path / "cache")
    assert documents(dataset) == [[3, 4, 5, 2], [6, 2], [7, 8, 9, 10, 11, 12, 2]]
    assert dataset.num_tokens == 13
    assert dataset.tokens.dtype == np.uint16


def test_groups_do_not_change_the_result(source, vocabulary, tmp_path, monkeypatch):
    whole = open_tokens(source, vocabulary, tmp_path / "a")
    monkeypatch.setattr(tokens_module.grouped, "__defaults__", (1,))  # one document in each call of the tokenizer
    single = open_tokens(source, vocabulary, tmp_path / "b")
    assert documents(single) == documents(whole)
    assert single.fingerprint == whole.fingerprint


def test_the_second_time_nothing_is_tokenised(source, vocabulary, tmp_path, monkeypatch):
    first = open_tokens(source, vocabulary, tmp_path / "cache")
    monkeypatch.setattr(tokens_module, "_write", None)  # calling it would fail
    again = open_tokens(source, vocabulary, tmp_path / "cache")
    assert documents(again) == documents(first)
    assert again.fingerprint == first.fingerprint


def test_long_documents_are_split_or_cut(source, vocabulary, tmp_path):
    split = open_tokens(source, vocabulary, tmp_path / "cache", max_document_tokens=3)
    assert documents(split) == [[3, 4, 5], [2], [6, 2], [7, 8, 9], [10, 11, 12], [2]]
    assert split.hashes[0] == split.hashes[1] != split.hashes[2]
    cut = open_tokens(source, vocabulary, tmp_path / "cache", max_document_tokens=3, long_documents="cut")
    assert documents(cut) == [[3, 4, 5], [6, 2], [7, 8, 9]]
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_the_fingerprint_is_of_the_content_not_of_the_place(source, vocabulary, tokenizer_folder, tmp_path):
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "text.jsonl").read_bytes())
    here = open_tokens(source, vocabulary, tmp_path / "cache")
    there = open_tokens(open_source(str(tmp_path / "copy.jsonl")), vocabulary, tmp_path / "cache")
    assert here.fingerprint == there.fingerprint
    assert len(os.listdir(tmp_path / "cache")) == 2
    # Equal text and equal lengths, another token at the end.
    other = open_tokens(source, load_vocabulary(tokenizer_folder, document_end_token="w9"), tmp_path / "cache")
    assert other.fingerprint != here.fingerprint


def test_an_empty_source_is_refused_and_leaves_nothing(vocabulary, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(DataError, match="holds no text"):
        open_tokens(open_source(str(tmp_path / "empty.jsonl")), vocabulary, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_a_source_that_breaks_off_leaves_nothing(vocabulary, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": ')
    with pytest.raises(DataError, match=r"Cannot read .*bad\.jsonl"):
        open_tokens(open_source(str(tmp_path / "bad.jsonl")), vocabulary, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_another_process_may_finish_first(source, vocabulary, tmp_path, monkeypatch):
    whole = tokens_module._write

    def write_and_be_overtaken(folder, *args):
        whole(folder, *args)
        if not folder.name.startswith(".overtaken"):
            monkeypatch.setattr(tokens_module, "_write", whole)
            open_tokens(source, vocabulary, tmp_path / "cache")

    monkeypatch.setattr(tokens_module, "_write", write_and_be_overtaken)
    dataset = open_tokens(source, vocabulary, tmp_path / "cache")
    assert dataset.num_tokens == 13
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_every_damage_to_a_cache_is_found_and_mended(source, vocabulary, tmp_path):
    whole = open_tokens(source, vocabulary, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(os.listdir(folder)) == ["blocks.npy", "hashes.npy", "lengths.npy", "meta.json", "tokens.bin"]
    for path, harm in harms(folder, seed=5):
        intact = path.read_bytes()
        with harm, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            dataset = open_tokens(source, vocabulary, tmp_path / "cache")
            assert documents(dataset) == documents(whole)
            assert dataset.fingerprint == whole.fingerprint
            if path.name == "meta.json" and not warned:  # a blank became another one
                assert json.loads(path.read_text()) == json.loads(intact)
                continue
            (message,) = [str(warning.message) for warning in warned]
            assert str(folder) in message
            assert path.name in message
            assert message.endswith("The text is tokenised again.")
            assert os.listdir(tmp_path / "cache") == [folder.name]
            assert path.read_bytes() == intact


def test_a_damaged_block_is_found_when_it_is_read_and_not_before(source, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "BLOCK_BYTES", 4)
    open_tokens(source, vocabulary, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/tokens.bin")
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + b"?")
    dataset = open_tokens(source, vocabulary, tmp_path / "cache")
    assert dataset.document(1).tolist() == [6, 2]
    with pytest.warns(UserWarning, match=r"tokens\.bin is damaged: block 6 of 7"):
        assert dataset.document(2).tolist() == [7, 8, 9, 10, 11, 12, 2]
    assert path.read_bytes() == intact
    # Its text has been replaced by another one of the same size.
    path.write_bytes(intact[:-1] + b"?")
    dataset = open_tokens(source, vocabulary, tmp_path / "cache")
    monkeypatch.setattr(type(source), "documents", lambda _: iter(["w1"] * 6 + [""]))
    with pytest.warns(UserWarning, match="block 6"), pytest.raises(DataError, match=r"its text gives other tokens now"):
        dataset.document(2)


def test_processes_that_find_the_same_damage_mend_it_once(source, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "BLOCK_BYTES", 4)
    open_tokens(source, vocabulary, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    intact = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(intact[:-1] + b"?")
    first, second = (open_tokens(source, vocabulary, tmp_path / "cache") for _ in range(2))
    there = folder.stat().st_ino
    with pytest.warns(UserWarning, match="block 6"):
        expected = documents(first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert documents(second) == expected
    assert folder.stat().st_ino == there  # never gone


def test_a_cache_without_checksums_is_read_with_a_note(source, vocabulary, tmp_path):
    whole = open_tokens(source, vocabulary, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if "checksum" not in k}))
    (folder / "blocks.npy").unlink()
    with pytest.warns(UserWarning, match=f"{folder} has no checksums"):
        assert documents(open_tokens(source, vocabulary, tmp_path / "cache")) == documents(whole)


def test_a_cache_folder_that_cannot_be_made_is_refused(source, vocabulary, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"a file stands where a folder is needed.* set data\.cache_dir"):
        open_tokens(source, vocabulary, tmp_path / "file")


def test_half_a_surrogate_pair_in_json_does_not_stop_the_work(vocabulary, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "w1 \\ud800 w2"}\n')
    source = open_source(str(tmp_path / "odd.jsonl"))
    assert list(source.documents()) == ["w1 \ufffd w2"]
    assert documents(open_tokens(source, vocabulary, tmp_path / "cache")) == [[4, 0, 5, 2]]
