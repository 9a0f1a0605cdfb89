"""What a compiler says, and the process in which it says it."""

import json
import os
import sys
from pathlib import Path

import pytest

from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.plan import steps
from jaxhybrid.plan.cache import Cache, cache_folder
from jaxhybrid.plan.compiler import environment, find_libtpu, in_worker, out_of_memory
from jaxhybrid.plan.memory import Memory, advice
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import DistillConfig

ROOT = Path(__file__).parents[2]

# Of jit_distill_step for four v5e chips, libtpu 0.0.50. The size is that of the arguments and all else.
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (19.11G) exceeds available HBM (15.75G). HLO module: jit_distill_step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)
GIB = 2**30


def test_sizes_in_an_out_of_memory_error():
    assert out_of_memory(TOO_LARGE) == (19.11 * GIB, 15.75 * GIB)
    assert out_of_memory("... Used 922.5M of 1.5G hbm. Exceeded ...") == (922.5 * 2**20, 1.5 * GIB)
    assert out_of_memory("INVALID_ARGUMENT: something else") is None


def test_libtpu_is_asked_for_with_the_ways_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "absent.so"))
    with pytest.raises(ConfigError, match=r"absent\.so.*make tpu-compiler.*pip install --target DIR libtpu"):
        find_libtpu()
    (tmp_path / "absent.so").touch()
    assert find_libtpu() == tmp_path / "absent.so"


def test_the_compilers_environment_stays_in_its_process(tmp_path):
    before = dict(os.environ)
    assert environment(tmp_path / "libtpu.so")["TPU_SKIP_MDS_QUERY"] == "1"
    assert environment(None) == before | {"JAX_PLATFORMS": "cpu"}
    assert dict(os.environ) == before


def test_what_the_environment_tells_the_compiler_is_in_the_key(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_", "LIBTPU_"))]:
        monkeypatch.delenv(name)
    asked = []
    monkeypatch.setattr(steps, "in_worker", lambda request, libtpu: {"asked": asked.append(request)})
    path = ROOT / "configs" / "qwen2.5-3b-instruct.yaml"
    planned = Planned(load_config(path, [f"teacher={ROOT / 'configs' / 'teachers' / path.stem}"]))
    ask = steps.Steps(Topology.parse("h200:8"), tmp_path, 1).figures

    def key():
        ask(planned, ["align"])
        newest = max((tmp_path / "requests").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        return json.loads(newest.read_text())["key"]

    assert "environment" not in key()  # what was kept without any is found again
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    ask(planned, ["align"])
    assert len(asked) == 1
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    assert key()["environment"] == {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=65536"}
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    assert set(key()["environment"]) == {"LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION"}
    assert len(asked) == 3


def test_a_worker_that_dies_says_why(monkeypatch, tmp_path):
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'KeyError: topology' >&2\nexit 3\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(RunError, match=r"(?s)Planning align ended with code 3.*KeyError: topology"):
        in_worker({"stage": "align"}, None)


def test_figures_are_made_once(tmp_path):
    cache, calls = Cache(tmp_path / "plans"), []

    def make():
        calls.append(1)
        return {"memory": 7}

    assert [cache.get({"program": "a"}, make) for _ in range(2)] == [{"memory": 7}] * 2
    cache.get({"program": "b"}, make)
    assert len(calls) == 2


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXHYBRID_PLAN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("JAXHYBRID_PLAN_CACHE")
    assert cache_folder().parts[-2:] == ("jaxhybrid", "plans")


def figures(**compiled):
    given = {"parameters": 2 * GIB, "optimizer": 4 * GIB, "teacher": 0, "batch": 0}
    return {"given": given, "held": GIB, "compiled": compiled}


def test_the_verdict_is_the_compilers_and_counts_what_lies_beside_the_step():
    topology = Topology.parse("v5e:2x2")
    fitting = Memory.of(figures(memory={"peak_memory": 14.5 * GIB, "temp": 12 * GIB}), topology)
    assert (fitting.all, fitting.beside, fitting.teacher, fitting.fits) == (15.5, 8.5, 1.0, True)
    refused = Memory.of(figures(out_of_memory={"needed": 19.11 * GIB}), topology)
    assert (refused.all, refused.fits) == (pytest.approx(20.11), False)


def test_what_to_change_when_it_does_not_fit():
    topology, mesh = Topology.parse("v5e:2x2"), {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    memory = Memory.of(figures(out_of_memory={"needed": 19.11 * GIB}), topology)
    told = advice("distill", DistillConfig(), memory, mesh)
    assert told.startswith("distill needs 4.36 GiB more than there are: distill.gradient_accumulation=2")
    assert "distill.remat=offload" in told
    assert "distill.offload=moments" in told
    assert "mesh.context=2" in advice("distill", DistillConfig(batch_size=4), memory, mesh)
    assert "distill.remat=block" in advice("distill", DistillConfig(remat="dots"), memory, mesh)
