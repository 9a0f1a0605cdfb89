"""How benchmarks/compiled_step.py counts the kernels of loops in loops."""

import importlib
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

TEXT = """HloModule step

%fused_add (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  ROOT %add.1 = f32[1000]{0} add(%p, %p)
}

%inner (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %loop_add_fusion.3 = f32[1000]{0} fusion(%x), kind=kLoop, calls=%fused_add, metadata={op_name="mlp/add"}
}

%region_2.7 (y: f32[1000]) -> f32[1000] {
  %y = f32[1000]{0} parameter(0)
  %copy.9 = f32[1000]{0} copy(%y)
  ROOT %while.4 = f32[1000]{0} while(%copy.9), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (z: f32[1000]) -> f32[1000] {
  %z = f32[1000]{0} parameter(0)
  ROOT %while.5 = f32[1000]{0} while(%z), condition=%c, body=%region_2.7, backend_config={"known_trip_count":{"n":"28"}}
}
"""


@pytest.fixture
def compiled_step(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the script sets flags for a compiler without a card
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent / "kernels/benchmarks"))
    return importlib.import_module("compiled_step")


def test_kernels_count_as_often_as_they_run(compiled_step):
    assert compiled_step.repeats(TEXT) == {"region_2.7": 28, "inner": 84}
    found = compiled_step.kernels(TEXT, bandwidth=1e6, rate=1.0)
    by_name = {alike.name: (alike.scope, least, count) for alike, (least, count) in found.items()}
    assert by_name == {  # 4,000 bytes in and out
        "loop_add_fusion": ("mlp", pytest.approx(84 * 8.0), 84),
        "copy": ("no scope", pytest.approx(28 * 8.0), 28),
    }
