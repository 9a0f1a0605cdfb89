"""Eight fake CPU devices for the sharded tests, no word to the network, a tiny teacher and a whole run for everyone."""

import os

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Compiling is nearly all of the time here; leaving out LLVM's optimisations halves it.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_force_host_platform_device_count=8"
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import numpy as np
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.transformer import Model, random_params
from tests.runs import Workshop


def make_teacher(**changes):
    """A random four-layer model whose width divides over eight devices."""
    settings = {
        "family": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    config = ModelConfig(**(settings | changes))
    params = jax.jit(lambda key: random_params(config, key))(jax.random.key(0))
    # Larger weights than an untrained model's, so that attention and the loss are not flat.
    return Model(jax.tree.map(lambda x: x * 6 if x.ndim > 2 else x, params), config)


def make_batch(vocab_size, batch=8, length=24, seed=0):
    """Packed rows: two documents, then padding in every second row."""
    rng = np.random.default_rng(seed)
    segments = np.ones((batch, length), np.int32)
    segments[:, length // 3 :] = 2
    segments[::2, length - 3 :] = 0
    tokens = rng.integers(0, vocab_size, (batch, length)).astype(np.int32)
    return {"tokens": np.where(segments == 0, 0, tokens), "segment_ids": segments}


@pytest.fixture(scope="session")
def teacher():
    return make_teacher()


@pytest.fixture
def batch(teacher):
    return make_batch(teacher.config.vocab_size)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A workshop with one uninterrupted run in it, shared by the processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    workshop = Workshop(root / "whole")
    with FileLock(root / "whole.lock"):
        if not workshop.folder.exists():
            workshop.folder.mkdir()
            workshop.prepare()
            (workshop.folder / "output.txt").write_text(workshop.finish("run", workshop.config))
    return workshop


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Programs that a module compiles again come from a file; tracing them is left."""
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
                "jax_persistent_cache_min_compile_time_secs": 0}  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
