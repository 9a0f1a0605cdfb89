"""vLLM in this process, on a GPU if there is one, and the students that write_students.py wrote."""

import os
import tempfile
from pathlib import Path

# Before vLLM is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # at these sizes more threads only burn processor time
    "TRITON_F32_DEFAULT": "ieee",  # else its attention multiplies float32 in TF32 on a GPU
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_MODULES_CACHE": tempfile.mkdtemp(),  # tests may run side by side
}

import pytest


def pytest_addoption(parser):
    parser.addoption("--students", type=Path, required=True, help="the folder that write_students.py wrote")


def pytest_generate_tests(metafunc):
    if "student" in metafunc.fixturenames:
        names = sorted(path.stem for path in metafunc.config.getoption("--students").glob("*.npz"))
        if not names:
            raise pytest.UsageError(f"--students {metafunc.config.getoption('--students')}: no students are there.")
        metafunc.parametrize("student", names)


@pytest.fixture
def folder(pytestconfig):
    return pytestconfig.getoption("--students")


@pytest.fixture
def start():
    """Starts vLLM over an export; it ends with the test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def serve(export, **options):
        usual = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_batched_tokens": 64,  # prompts come in pieces, beside others' new tokens
            "max_num_seqs": 4,
            "max_logprobs": -1,
            "kv_cache_memory_bytes": 64 << 20,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "gpu_memory_utilization": 0.05,  # on a GPU others may test beside this one
        }
        return LLM(str(export), **usual | options)

    yield serve
    cleanup_dist_env_and_memory()
