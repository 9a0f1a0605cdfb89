"""A model in several files, and the folder it becomes in the cache."""

import errno
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import save_file

from jaxhybrid.errors import RunError, WeightsError
from jaxhybrid.weights.gguf import folder as gguf_folder_module
from jaxhybrid.weights.gguf.folder import gguf_folder
from jaxhybrid.weights.gguf.model import open_gguf
from jaxhybrid.weights.safetensors import stream_safetensors


@pytest.fixture
def file(small, tmp_path):
    return small.write(tmp_path / "model.gguf")


def parts(file, folder, count):
    """Cuts a file into so many parts, named by number."""
    folder.mkdir()
    data = file.read_bytes()
    size = -(-len(data) // count)
    for i in range(count):
        (folder / f"part{i + 1}.bin").write_bytes(data[i * size : (i + 1) * size])
    return str(folder / "part*.bin")


def content(name):
    folder = gguf_folder(str(name))
    return folder, {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "gguf.json"}


def test_head_equals_the_librarys(file):
    model, reader = open_gguf(str(file)), GGUFReader(file)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert model.metadata == theirs
    assert [
        (entry.name, entry.type, entry.shape, entry.offset, entry.size) for entry, _ in model.tensors.values()
    ] == [
        (t.name, t.tensor_type.name, tuple(t.shape[::-1].tolist()), t.data_offset, t.n_bytes) for t in reader.tensors
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 11, 300])
def test_plain_parts(count, file, tmp_path):
    """Part 2 comes before part 10; a cut may lie in the head, in a tensor or between."""
    pattern = parts(file, tmp_path / "parts", count)
    folder, found = content(pattern)
    shutil.rmtree(folder)
    again, expected = content(file)
    assert found == expected
    assert folder == again  # named by what it holds, not by what it came from


def test_parts_that_are_not_all_or_not_in_order(file, tmp_path):
    pattern = parts(file, tmp_path / "parts", 4)
    (tmp_path / "parts" / "part3.bin").rename(tmp_path / "part3.bin")
    with pytest.raises(WeightsError, match=rf"bytes, its table of tensors asks for {file.stat().st_size}"):
        gguf_folder(pattern)
    (tmp_path / "part3.bin").rename(tmp_path / "parts" / "part0.bin")
    with pytest.raises(WeightsError, match=r"part1\.bin, which begins a GGUF file but is not the first"):
        gguf_folder(pattern)
    (tmp_path / "parts" / "part0.bin").rename(tmp_path / "parts" / "part3.bin")
    (tmp_path / "parts" / "part5.bin").write_text("sha256 of all that")
    with pytest.raises(WeightsError, match="correct the pattern"):
        gguf_folder(pattern)
    with pytest.raises(WeightsError, match="name them all by a pattern"):
        gguf_folder(str(tmp_path / "parts" / "part1.bin"))
    (tmp_path / "parts" / "part5.bin").write_bytes(file.read_bytes())
    with pytest.raises(WeightsError, match=r"part5\.bin, which begins a GGUF file but is not the first"):
        gguf_folder(pattern)


def test_a_file_whose_name_looks_like_a_pattern(file, tmp_path):
    named = tmp_path / "model[1].gguf"
    file.rename(named)
    assert content(named)[1]


@pytest.fixture
def split(small, tmp_path):
    """llama.cpp's split, as its package writes one."""
    (tmp_path / "split").mkdir()
    small.write(tmp_path / "split" / "m.gguf", split_max_tensors=9)
    files = sorted((tmp_path / "split").iterdir())
    assert [path.name for path in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return files


def test_split_files(split, small, file):
    expected = content(file)[1]
    for name in (split[0], split[1], split[0].with_name("m-*.gguf")):
        found = content(name)[1]
        assert found.keys() == expected.keys()
        assert found == expected
    assert open_gguf(str(split[0])).digest() != open_gguf(str(file)).digest()


def test_split_files_that_do_not_belong_together(split, file):
    shutil.copyfile(file, split[0].with_name("other.gguf"))
    with pytest.raises(WeightsError, match="not the parts of one model"):
        gguf_folder(str(split[0].with_name("*.gguf")))
    shutil.copyfile(split[2], split[0].with_name("alone.gguf"))
    with pytest.raises(WeightsError, match="one of the 3 files of a split model"):
        gguf_folder(str(split[0].with_name("alone.gguf")))
    second = split[1].read_bytes()
    shutil.copyfile(split[0], split[1])
    with pytest.raises(WeightsError, match="not the parts of one model"):
        gguf_folder(str(split[0]))
    split[1].write_bytes(second)
    assert gguf_folder(str(split[0]))
    split[1].unlink()
    with pytest.raises(WeightsError, match=r"m-00002-of-00003\.gguf is not there"):
        gguf_folder(str(split[0]))
    with pytest.raises(WeightsError, match="not the parts of one model"):
        gguf_folder(str(split[0].with_name("m-*.gguf")))


# --- the folder in the cache


def test_another_file_of_the_same_name_is_another_folder(small, file, cache):
    first = gguf_folder(str(file))
    small.tensors["output_norm.weight"] = small.tensors["output_norm.weight"][0] + 1, None
    second = gguf_folder(str(small.write(file)))
    assert first != second
    assert first.name.startswith("Tiny-Model-")
    assert sorted(cache.iterdir()) == sorted([first, second])


def test_the_folder_is_made_once_and_made_again_when_it_is_not_whole(file, cache):
    folder, expected = content(file)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert gguf_folder(str(file)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    weights = folder / "model.safetensors"
    for spoil in (
        lambda: weights.write_bytes(weights.read_bytes()[:-4]),
        (folder / "tokenizer.json").unlink,
        (folder / "gguf.json").unlink,
        lambda: (folder / "gguf.json").write_text('{"sizes": 3}'),
        lambda: (folder / "gguf.json").write_text("{"),
    ):
        spoil()
        assert content(file)[1] == expected
    assert list(cache.iterdir()) == [folder]
    origin = json.loads((folder / "gguf.json").read_text())
    assert origin["files"] == [str(file)]
    assert origin["sha256"] == open_gguf(str(file)).digest()


def test_a_folder_that_another_process_made_meanwhile_stays(file, cache, monkeypatch):
    """That process reads it already."""
    write, made = gguf_folder_module.write_folder, []

    def overtaken(model, folder):
        write(model, folder)
        monkeypatch.setattr(gguf_folder_module, "write_folder", write)
        made.append(gguf_folder(str(file)).stat().st_ino)

    monkeypatch.setattr(gguf_folder_module, "write_folder", overtaken)
    folder = gguf_folder(str(file))
    assert made == [folder.stat().st_ino]
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_conversion_that_fails_leaves_nothing(number, file, cache, monkeypatch):
    def full(model, config, path):
        path.write_bytes(b"begun")
        raise OSError(number, "trouble")

    monkeypatch.setattr(gguf_folder_module, "write_weights", full)
    with pytest.raises(RunError, match=r"jaxhybrid/Tiny-Model.*set XDG_CACHE_HOME to another folder"):
        gguf_folder(str(file))
    assert list(cache.iterdir()) == []


def test_streamed_safetensors_are_the_librarys_bytes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"model.b": (3, 5), "model.a": (7,), "lm_head": (4, 2), "model.layers.10": (2,), "model.layers.9": (3,)}
    types = {name: np.dtype(jnp.bfloat16 if "layers" in name else np.float32) for name in shapes}
    types["lm_head"] = np.dtype(np.float16)
    tensors = {name: rng.standard_normal(shape).astype(types[name]) for name, shape in shapes.items()}
    stream_safetensors(tmp_path / "streamed", shapes, types, lambda name: np.array_split(tensors[name], 2))
    save_file(tensors, tmp_path / "saved", metadata={"format": "pt"})
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()
