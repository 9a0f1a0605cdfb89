"""What benchmarks/scaling.py makes of kernels in a profile and of its rows."""

import argparse
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("kernel", "instruction", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather-start.3", "gather"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "", "scatter"),
        ("ncclDevKernel_AllReduce_Sum_bf16_TREE_LL(...)", "all-reduce-start", "reduce"),
        ("ncclDevKernel_SendRecv(...)", "collective-permute-start.1", "neighbour"),
        ("ncclDevKernel_Generic_4(...)", "reduce-scatter.7", "other"),
        ("AllReduceKernelImpl", "all-reduce-start.4", "reduce"),
        ("sm90_xmma_gemm_bf16", "gemm_fusion_dot.3", None),
        ("loop_all_reduce_fusion", "loop_all_reduce_fusion", None),
    ],
)
def test_kinds_of_kernels(kernel, instruction, kind):
    assert importlib.import_module("overlap").kind_of(kernel, instruction) == kind


def test_what_of_a_collective_is_beside_other_kernels():
    ms = 1e6
    events = [
        (None, 0 * ms, 10 * ms),
        (None, 5 * ms, 12 * ms),  # at the same time as the first
        ("gather", 8 * ms, 16 * ms),  # 4 ms beside them, 4 alone
        ("gather", 20 * ms, 21 * ms),  # alone
        (None, 30 * ms, 40 * ms),
        ("scatter", 29 * ms, 41 * ms),  # 10 of 12
        ("scatter", 33 * ms, 34 * ms),  # all of it
    ]
    assert importlib.import_module("overlap").overlap(events) == {
        "gather": {"count": 2, "ms": pytest.approx(9), "hidden_ms": pytest.approx(4)},
        "scatter": {"count": 2, "ms": pytest.approx(13), "hidden_ms": pytest.approx(11)},
        "all": {"busy_ms": pytest.approx(16 + 1 + 12), "exposed_ms": pytest.approx(4 + 1 + 2)},
    }
    assert importlib.import_module("overlap").overlap([])["all"] == {"busy_ms": 0, "exposed_ms": 0}


def row(part, gpus, mesh, speed, **more):
    return {
        "part": part, "device": "H200", "jax": "0", "shape": "tiny", "stage": "distill", "gpus": gpus, "mesh": mesh,
        "rows": 8 * gpus, "length": 64, "documents": [100, 400], "flags": "", "settings": "",
        "tokens_per_second": speed, "ms": 10.0,
        "tflops_a_gpu": 395.0, "peak_gib": 2.0, **more,
    }  # fmt: skip


def test_shares_are_of_as_many_rows_a_gpu():
    rows = [
        row("weak", 2, "fsdp=2", 190.0),
        row("weak", 1, "one", 100.0),
        row("weak", 2, "fsdp=2", 180.0, flags="--other"),  # nothing to compare it with
        row("large", 2, "tensor=2", 50.0),
        row("context", 1, "one", 0.0, length=128, rows=1, out_of_memory="RESOURCE_EXHAUSTED"),
        row("context", 1, "one", 30.0, length=64, rows=1),
        row("context", 2, "context=2", 45.0, length=128, rows=1),
        row("context", 2, "context=2", 57.0, length=64, rows=1),
    ]
    tables = importlib.import_module("scaling_tables")
    texts = tables.tables(rows)
    assert list(texts) == ["weak", "large", "context"]
    page = "".join(f"<!-- {part} -->\nNone.\n<!-- end -->\n" for part in (*texts, "decode"))
    page = tables.on_page(tables.on_page(page, texts), texts)  # again in place of the first ones
    assert page.count("None.") == 1
    lines = page.splitlines()

    def cells(*beginning):
        (line,) = [line for line in lines if all(text in line for text in beginning)]
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert cells("2, `fsdp: 2`", " 190 |")[5:9] == ["95.0 %", "395", "50 %", "2.0"]
    assert cells("--other")[5] == ""
    assert cells("`tensor: 2`")[4] == "50"
    assert cells("does not fit")[1] == "1"
    assert [cells("`context: 2`", length)[5] for length in ("1 x 128", "1 x 64")] == ["", "95.0 %"]


def test_flags_that_would_use_multicast_are_refused():
    scaling = importlib.import_module("scaling")
    assert scaling.xla_flags("--xla_gpu_enable_pipelined_all_gather=true")
    with pytest.raises(argparse.ArgumentTypeError, match="symmetric"):
        scaling.xla_flags("--xla_gpu_experimental_enable_nccl_symmetric_buffers=true")
