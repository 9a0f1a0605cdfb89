"""Tiny models as drafts of GGUF files, and a cache of the test's own."""

import pytest

from tests.weights.conftest import make_torch_model
from tests.weights.gguf.make import SHAPE, byte_level_vocabulary, draft


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxhybrid"


@pytest.fixture(scope="session")
def qwen2():
    return make_torch_model("qwen2", **SHAPE)


@pytest.fixture
def small(qwen2):
    """A draft to spoil, and the file to write it to."""
    return draft(qwen2, byte_level_vocabulary("qwen2"))
