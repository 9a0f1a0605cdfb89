"""Every Hopper kernel once, small, for a memory or race checker to watch.

compute-sanitizer --tool memcheck python kernels/benchmarks/gpu_sanitize.py
compute-sanitizer --tool racecheck python kernels/benchmarks/gpu_sanitize.py
"""

import jax
import jax.numpy as jnp
from gpu_compare import make_inputs, with_backward
from jaxhybrid_kernels import linear_attention
from jaxhybrid_kernels.gpu import linear_attention as gpu_linear_attention


def main() -> None:
    for fewest, recurrences in ((0, ("gated_deltanet",)), (100, ("gated_deltanet", "simple_gla", "kimi_delta", "gla"))):
        gpu_linear_attention.FILLED = fewest  # 0: the forward that makes its own matrices
        jax.clear_caches()
        for recurrence in recurrences:
            inputs = make_inputs(1, 130, 2, 128, 0, recurrence)
            inputs["segment_ids"] = jnp.where(jnp.arange(130) < 70, 1, 2)[None]
            segment_ids = inputs.pop("segment_ids")

            def function(segment_ids=segment_ids, **inputs):
                return linear_attention(**inputs, segment_ids=segment_ids, implementation="pallas_gpu")

            gradients = jax.jit(lambda inputs, function=function: with_backward(function, inputs))(inputs)
            finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(gradients))
            print(f"{recurrence}, {'fused' if fewest == 0 else 'prepared'} matrices: finite {finite}", flush=True)


if __name__ == "__main__":
    main()
