"""Kernels compiled for an H100 that is not there, to PTX."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gpu_resources import absent_h100
from jax.sharding import SingleDeviceSharding
from launch import Launch, read_launch
from program import Program

PTX, PASSES = ".ptx", ".mlir-passes.log"


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    program: Program
    launch: Launch
    operands: list[np.ndarray]
    results: list[np.ndarray]  # shapes and dtypes


class Compiler:
    def __init__(self, dump: Path):
        """`gpu_resources.set_up` has named the folder to Mosaic."""
        self._dump = dump
        self._device, self._mesh = absent_h100()

    def compile(
        self, name: str, kernel: Callable[..., Any], operands: Sequence[jax.Array], results: Sequence[Any]
    ) -> Compiled:
        # In a thread of its own JAX knows nothing of the gradient being made, whose place it would give to every
        # instruction, nor that `jit` is disabled.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._compile, kernel, operands).result()
        ptx = self._written(PTX)
        return Compiled(
            name,
            ptx,
            Program(ptx),
            read_launch(self._written(PASSES)),
            [np.asarray(operand) for operand in operands],
            [np.empty(result.shape, result.dtype) for result in results],
        )

    def _compile(self, kernel: Callable[..., Any], operands: Sequence[jax.Array]) -> None:
        for path in self._dump.iterdir():
            path.unlink()
        sharding = SingleDeviceSharding(self._device)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands]
        with jax.sharding.use_abstract_mesh(self._mesh):
            jax.jit(kernel).trace(*placed).lower(lowering_platforms=("cuda",)).compile()

    def _written(self, ending: str) -> str:
        found = [path for path in self._dump.iterdir() if path.name.endswith(ending)]
        if len(found) != 1:
            raise ValueError(f"Mosaic wrote {len(found)} files *{ending}, one was expected")
        return found[0].read_text()
