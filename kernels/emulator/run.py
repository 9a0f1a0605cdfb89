"""The Hopper kernels on a machine without a GPU: compiled for an H100, their PTX emulated.

    python kernels/emulator/run.py                                   # every recurrence and form at 64 channels
    python kernels/emulator/run.py --recurrence kimi_delta --widths 128,64 --forms spans --schedules 3
    python kernels/emulator/run.py --faults                          # takes waits and barriers out: is it noticed?
    python kernels/emulator/run.py --assemblers .../bin/ptxas        # do these leave products' registers alone?

Each case is one of test_on_gpu.py's `test_recurrences_and_widths`: results and all gradients against the float64 token
recurrence, and what machine.py knows of a kernel: races by lines of its source, copies out of bounds, writes outside of
arrays, deadlocks. With more schedules every kernel must give the same bits in each. Ends with 1 if anything is wrong.

Needs JAX's CUDA plugin (`jax[cuda13]`), which brings the assembler, numpy, pytest (for the suite's cases) and
jaxhybrid_kernels, installed or on PYTHONPATH; no GPU. Where there is no nvdisasm, Mosaic says so for every
kernel, which is no matter.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from assembled import Assembler
    from cases import Emulated, Run

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recurrence", nargs="*", help="all by default")
    parser.add_argument("--widths", nargs="*", default=["64,64"], metavar="K,V")
    parser.add_argument("--forms", nargs="*", help="prepared, fused, spans; all by default")
    parser.add_argument("--tokens", type=int, help="130 by default")
    parser.add_argument("--schedules", type=int, default=1, help="of each kernel")
    parser.add_argument("--assemblers", nargs="*", type=Path, default=[], help="of any CUDA; needs nvdisasm")
    parser.add_argument("--faults", action="store_true", help="plant faults as well, see faults.py")
    parser.add_argument("--most", type=int, default=4, help="planted faults of a kind and kernel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="emulator-") as dump:
        sys.exit(0 if run(args, Path(dump)) else 1)


def run(args: argparse.Namespace, dump: Path) -> bool:
    from gpu_resources import set_up

    set_up(str(dump))
    os.environ["JAX_PLATFORMS"] = "cpu"
    from assembled import Assembler
    from cases import load_suite, run_case
    from compiler import Compiler
    from errors import Fault, Refused

    args.assemblers = [Assembler.of(ptxas) for ptxas in args.assemblers]
    suite = load_suite()
    compiler = Compiler(dump)
    right = True
    cases = itertools.product(args.recurrence or suite.RECURRENCES, args.widths, args.forms or suite.FORMS)
    for recurrence, widths, form in cases:
        start = time.time()
        K, V = (int(width) for width in widths.split(","))
        try:
            case = run_case(suite, compiler, recurrence, (K, V), form, args.tokens or suite.TOKENS)
            said, wrong = summary(case), list(what_is_wrong(case, suite.LEAST_COSINE, args))
        except (Fault, Refused) as stopped:
            said, wrong = "stopped", [f"{type(stopped).__name__}: {stopped}"]
        verdict = "WRONG" if wrong else "right"
        print("\n    ".join([f"{recurrence} {widths} {form}: {verdict}, {said}, {time.time() - start:.0f} s", *wrong]))
        sys.stdout.flush()
        right = right and not wrong
    return right


def summary(case: "Run") -> str:
    names, cosines = list(case.cosines), list(case.cosines.values())
    worst = int(np.argmin(cosines))  # NaN is the least
    places = sorted(set().union(*(emulated.outcome.remarks for emulated in case.kernels)))
    return f"1 - cosine at most {1 - cosines[worst]:.1e} ({names[worst]}), {len(case.kernels)} kernels" + (
        f", products with rows that nobody wrote at {', '.join(places)}" if places else ""
    )


def what_is_wrong(case: "Run", least_cosine: float, args: argparse.Namespace) -> Iterator[str]:
    for name, cosine in case.cosines.items():
        if not cosine > least_cosine:
            yield f"{name}: cosine {cosine:.5f}"
    for emulated in case.kernels:
        for fault, count in emulated.outcome.faults.items():
            yield f"{emulated.kernel.name}: {fault}, {count} times"
        yield from in_other_schedules(emulated, args.schedules - 1)
        yield from as_assembled(emulated, args.assemblers)
        if args.faults:
            yield from unnoticed(emulated, args.most)


def in_other_schedules(emulated: "Emulated", count: int) -> Iterator[str]:
    from cases import other_schedules

    for schedule, outcome in other_schedules(emulated, count):
        for number, (a, b) in enumerate(zip(outcome.results, emulated.outcome.results, strict=True)):
            if a.tobytes() != b.tobytes():
                yield f"{emulated.kernel.name}: other bits in result {number}, {schedule}"
        for fault in outcome.faults.keys() - emulated.outcome.faults.keys():
            yield f"{emulated.kernel.name}: {fault}, {schedule}"


def as_assembled(emulated: "Emulated", assemblers: list["Assembler"]) -> Iterator[str]:
    from assembled import touched

    for assembler in assemblers:
        for fault in touched(assembler.instructions(emulated.kernel.ptx)):
            yield f"{emulated.kernel.name}, ptxas {assembler.version}: {fault}"


def unnoticed(emulated: "Emulated", most: int) -> Iterator[str]:
    """Where nothing is noticed of all of a kind; prints how many single ones are."""
    from faults import KINDS, planted

    faults = list(planted(emulated.kernel, emulated.outcome, most))
    counts = []
    for kind in KINDS:
        single = [fault for fault in faults if fault.kind == kind and fault.place is not None]
        counts.append(f"{kind} {sum(fault.noticed for fault in single)} of {len(single)}")
        for fault in faults:
            if fault.kind == kind and fault.place is None and not fault.noticed:
                yield f"{emulated.kernel.name}: not noticed that every {kind} is missing"
    print(f"    {emulated.kernel.name}, single ones taken out and noticed: {', '.join(counts)}")
    for place in sorted({str(fault.place) for fault in faults if fault.place is not None and not fault.noticed}):
        print(f"        not noticed: {place}", flush=True)


if __name__ == "__main__":
    main()
