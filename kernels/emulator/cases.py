"""Cases of the test suite with their kernels emulated."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from compiler import Compiled, Compiler
from jax.experimental.pallas import mosaic_gpu
from jaxhybrid_kernels.gpu import linear_attention as gpu_linear_attention
from machine import Outcome, Schedule, emulate

SIZES = {"B": 2, "Hq": 2, "Hk": 2, "N": 2}


def load_suite() -> ModuleType:
    """The suite's conftest, before JAX has chosen its devices."""
    path = Path(__file__).parents[1] / "tests/conftest.py"
    spec = importlib.util.spec_from_file_location("kernel_suite", path)
    assert spec is not None
    assert spec.loader is not None
    suite = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = suite  # its dataclasses look for their module
    spec.loader.exec_module(suite)
    return suite


class Emulated(NamedTuple):
    kernel: Compiled
    outcome: Outcome


class Run(NamedTuple):
    cosines: dict[str, float]
    kernels: list[Emulated]


def run_case(
    suite: ModuleType, compiler: Compiler, recurrence: str, widths: tuple[int, int], form: str, tokens: int
) -> Run:
    constants, sizes = suite.FORMS[form]
    case = suite.make_case(recurrence, tokens, **SIZES | {"K": widths[0], "V": widths[1]} | sizes)

    def run(*given: Any) -> Any:
        with jax.disable_jit():  # so that kernels are given numbers
            return suite.run(*given)

    with emulated_kernels(compiler, constants) as kernels:
        return Run(suite.cosines(case, "pallas_gpu", run), kernels)


@contextmanager
def emulated_kernels(compiler: Compiler, constants: dict[str, int]) -> Iterator[list[Emulated]]:
    """Mosaic's kernels are emulated meanwhile; which, in their order."""
    original, kernels = mosaic_gpu.kernel, []

    def kernel(body: Any, *, out_type: Sequence[Any], **given: Any) -> Any:
        real = original(body, out_type=out_type, **given)

        def run(*operands: jax.Array) -> list[jax.Array]:
            compiled = compiler.compile(body.__module__.rpartition(".")[2], real, operands, out_type)
            outcome = emulate(compiled.program, compiled.launch, compiled.operands, compiled.results)
            kernels.append(Emulated(compiled, outcome))
            return [jnp.asarray(result) for result in outcome.results]

        return run

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(mosaic_gpu, "kernel", kernel))
        # As if for a GPU: kernels for the interpreter differ.
        patches.enter_context(mock.patch.object(gpu_linear_attention, "target_platform", return_value="gpu"))
        for name, value in constants.items():
            patches.enter_context(mock.patch.object(gpu_linear_attention, name, value))
        yield kernels


def other_schedules(emulated: Emulated, count: int) -> Iterator[tuple[Schedule, Outcome]]:
    """Copies late, and shared memory that begins with numbers; warps from the last to the first, then at random."""
    kernel = emulated.kernel
    for seed in range(count):
        schedule = Schedule(late_copies=True, fill=0, seed=seed)
        if seed == 0:
            schedule = Schedule(late_copies=True, fill=0x7F, reverse=True)
        yield schedule, emulate(kernel.program, kernel.launch, kernel.operands, kernel.results, schedule)
