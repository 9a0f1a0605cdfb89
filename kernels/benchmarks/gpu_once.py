"""The Hopper kernels once, for a checker or a profiler to watch: all forms, small, or what one shape takes.

    compute-sanitizer --tool memcheck python kernels/benchmarks/gpu_once.py
    compute-sanitizer --tool racecheck python kernels/benchmarks/gpu_once.py
    ncu --kernel-name regex:mosaic --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed \\
        python kernels/benchmarks/gpu_once.py --shape 8,4096,16,128
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gpu_compare import RECURRENCES, forward, make_inputs, with_backward
from jaxhybrid_kernels import linear_attention
from jaxhybrid_kernels.gpu import linear_attention as gpu_linear_attention

# What the kernels choose by shape is forced on a small one: module constants, and the recurrences to run with them.
FORMS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "fused": ({"FILLED": 0}, ("gated_deltanet", "simple_gla")),
    "prepared": ({}, ("gated_deltanet", "simple_gla", "kimi_delta", "gla")),
    "spans": ({"FEWEST_SPANS": 2, "SHORTEST_SPAN": 1}, ("gated_deltanet", "simple_gla", "kimi_delta", "gla")),
}


def run(inputs: dict[str, jax.Array], segment_ids: jax.Array | None) -> bool:
    """Both directions; whether all results are finite."""
    function = partial(linear_attention, segment_ids=segment_ids, implementation="pallas_gpu")
    results: list[Any] = [jax.jit(partial(what, function))(inputs) for what in (forward, with_backward)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS, help="without --shape")
    parser.add_argument("--shape", metavar="B,T,H,width", help="only this shape, in the form that is chosen for it")
    parser.add_argument("--recurrence", default="gated_deltanet", choices=RECURRENCES, help="with --shape")
    args = parser.parse_args()
    if args.shape is not None:
        sizes = [int(size) for size in args.shape.split(",")]
        print(f"finite {run(make_inputs(*sizes, 0, args.recurrence), None)}")
        return
    for form in args.forms:
        constants, recurrences = FORMS[form]
        before = {name: getattr(gpu_linear_attention, name) for name in constants}
        vars(gpu_linear_attention).update(constants)
        jax.clear_caches()
        for recurrence in recurrences:
            inputs = make_inputs(1, 130, 2, 128, 0, recurrence)
            print(
                f"{recurrence}, {form}: finite {run(inputs, jnp.where(jnp.arange(130) < 70, 1, 2)[None])}", flush=True
            )
        vars(gpu_linear_attention).update(before)


if __name__ == "__main__":
    main()
