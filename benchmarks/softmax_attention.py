"""One softmax layer's attention by itself: time and memory of each form.

    python benchmarks/softmax_attention.py                           # on a GPU
    python benchmarks/softmax_attention.py --sizes 1,32768,12,2,128 --documents 100,400 4000,9000

Forward alone, and with gradients, in bfloat16: the least of five means of four calls each, and their median. Memory is
what the compiled program with gradients takes besides its arguments.

    kernel        what `causal_attention` chooses on Hopper: the package's own kernels
    windows       cuDNN on blocks of queries, each against a window of the keys
    mask          cuDNN with the documents as a boolean array
    causal        cuDNN without documents
    last quarter  `kernel` for the last quarter of the queries, as the last of four devices has that share a row, and
                  `last quarter by windows`
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.softmax import causal_attention

SWITCH = "JAXHYBRID_ATTENTION_KERNELS"

Arrays = tuple[jax.Array, ...]
Form = Callable[..., jax.Array]


def masked(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def causal(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def last_quarter(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    first = jnp.int32(q.shape[1] * 3 // 4)
    own = jax.lax.slice_in_dim(q, q.shape[1] * 3 // 4, q.shape[1], axis=1)
    out = causal_attention(own, k, v, None, key_segment_ids=ids, first_query=first)
    return jnp.pad(out, ((0, 0), (q.shape[1] * 3 // 4, 0), (0, 0), (0, 0)))


def without_kernels(form: Form) -> Form:
    """`form`, traced with the package's kernels off."""

    def run(*arguments: jax.Array) -> jax.Array:
        os.environ[SWITCH] = "0"
        try:
            return form(*arguments)
        finally:
            del os.environ[SWITCH]

    return run


FORMS: dict[str, Form] = {
    "kernel": causal_attention,
    "windows": without_kernels(causal_attention),
    "mask": masked,
    "causal": causal,
    "last quarter": last_quarter,
    "last quarter by windows": without_kernels(last_quarter),
}


def inputs(sizes: tuple[int, ...], shortest: int, longest: int) -> Arrays:
    B, T, H, G, K = sizes
    rng = np.random.default_rng(0)
    ids = np.zeros((B, T), np.int32)
    for row in ids:
        ends = np.cumsum(rng.integers(shortest, longest + 1, size=T // shortest + 1))
        row[:] = np.searchsorted(ends, np.arange(T), side="right") + 1
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (B, T, H, K), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, G, K), jnp.bfloat16) for key in keys[2:])
    return q, k, v, jnp.asarray(ids), d_out


def with_gradients(form: Form) -> Callable[..., Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *x: form(*x, ids), q, k, v)
        return out, *pull(d_out)

    return run


def measure(run: Callable[..., Any], arguments: Arrays) -> tuple[str, float]:
    """Milliseconds, the least and the median, and MiB besides the arguments."""
    compiled = jax.jit(run).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - begin) / 4)
    told = f"{min(times):8.3f} ({np.median(times):.3f}) ms"
    return told, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


def pair(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=pair, default=[(8, 4096, 12, 2, 128), (1, 32768, 12, 2, 128)])
    parser.add_argument("--documents", nargs="+", type=pair, default=[(100, 400), (4000, 9000), (200000, 200000)])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; sizes are B,T,H,G,K", flush=True)
    for sizes in options.sizes:
        for shortest, longest in options.documents:
            *arguments, d_out = inputs(sizes, shortest, longest)
            print(f"{sizes}, documents of {shortest} to {longest} tokens")
            for name in options.forms:
                forward, _ = measure(FORMS[name], tuple(arguments))
                both, memory = measure(with_gradients(FORMS[name]), (*arguments, d_out))
                print(
                    f"  {name:22s} {forward} forward {both} with gradients {memory:8.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
