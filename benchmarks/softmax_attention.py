"""One softmax layer's attention by itself: time and memory of the package's form beside a mask of tokens by tokens.

    python benchmarks/softmax_attention.py                           # on a GPU
    python benchmarks/softmax_attention.py --sizes 1,32768,12,2,128 --documents 100,400 4000,9000

Forward and backward, and forward alone, in bfloat16: the median of five times the mean of four calls. Memory is what
the compiled program takes besides its arguments. `mask` gives cuDNN the documents as a boolean array (the package's own
form until it had another), `causal` is cuDNN without documents, `last quarter` the package's form for the last quarter
of the queries, as the last of four devices has that share a row.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.softmax import causal_attention

Arrays = tuple[jax.Array, ...]


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


FORMS: dict[str, Callable[..., jax.Array]] = {
    "mask": masked,
    "package": causal_attention,
    "causal": causal,
    "last quarter": last_quarter,
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


def with_gradients(form: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *x: form(*x, ids), q, k, v)
        return out, *pull(d_out)

    return run


def measure(run: Callable[..., Any], arguments: Arrays) -> tuple[float, float]:
    """Milliseconds, and MiB besides the arguments."""
    compiled = jax.jit(run).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / 4)
    return 1e3 * float(np.median(times)), (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20


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
                    f"  {name:13s} {forward:8.2f} ms forward {both:8.2f} ms with gradients {memory:8.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
