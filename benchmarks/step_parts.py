"""Parts of a distillation step by themselves, in several forms: SwiGLU's gradient, SwiGLU to float8, sums of the loss.

    python benchmarks/step_parts.py            # the sizes of Qwen2.5-1.5B with 8 rows of 4096 tokens, on a GPU

SwiGLU's gradient is that for gate and up and the input of the product that follows, which is made anew. `lower` is what
arrays read and written once would take at 4.3 TB/s, products of the loss at 790 TFLOP/s. Mean of ten calls.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxhybrid_kernels import KLSums, float8_swiglu, kl_sums
from jaxhybrid_kernels.gpu.float8_swiglu import float8_swiglu_kernel
from jaxhybrid_kernels.gpu.kl_sums import kl_sums_kernel

from jaxhybrid import losses
from jaxhybrid.model.head import Head

BYTES, PRODUCTS = 4.3e12, 790e12  # a second, on an H200


def milliseconds(run: Callable[..., Any], *arguments: jax.Array) -> float:
    compiled = jax.jit(run)
    jax.block_until_ready(compiled(*arguments))
    began = time.perf_counter()
    for _ in range(10):
        out = compiled(*arguments)
    jax.block_until_ready(out)
    return 100 * (time.perf_counter() - began)


# --- SwiGLU: (gate and up as one array or as two, y's gradient, which tokens there are) -> (y, gradients of both)


def as_jax_has_it(gate: jax.Array, up: jax.Array, d: jax.Array, _: jax.Array) -> Any:
    y, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    return y, *pull(d)


def as_one_array(both: jax.Array, d: jax.Array, _: jax.Array) -> Any:
    y, *gradients = swiglu(*jnp.split(both, 2, axis=-1), d)
    return y, jnp.concatenate(gradients, axis=-1)


def with_a_shared_operand(gate: jax.Array, up: jax.Array, d: jax.Array, is_token: jax.Array) -> Any:
    """XLA makes one kernel of loops that share an operand, unless that is what a library's call gave."""
    return swiglu(*(jnp.where(is_token[:, None], x, 0) for x in (gate, up, d)))


def swiglu(gate: jax.Array, up: jax.Array, d: jax.Array) -> Any:
    """(y, gradients of gate and up) for d, that of y."""
    gate, up, d = (x.astype(jnp.float32) for x in (gate, up, d))
    share = jax.nn.sigmoid(gate)
    made = gate * share * up, d * up * share * (1 + gate * (1 - share)), d * gate * share
    return tuple(x.astype(jnp.bfloat16) for x in made)


def used(form: Callable[..., Any]) -> Callable[..., Any]:
    """`form` between products, as in a step: what a library's calls give and take."""

    def run(x: jax.Array, kernel: jax.Array, ids: jax.Array) -> Any:
        if form is as_one_array:
            given = (x @ jnp.concatenate([kernel, 2 * kernel], 1),)
        else:
            given = x @ kernel, (2 * x) @ kernel
        return [jnp.dot(x.T, out) for out in form(*given, (3 * x) @ kernel, ids + 1 > 0)]

    return run


# --- the loss


def in_one_reduction(logits: jax.Array, teacher: jax.Array) -> KLSums:
    """The three sums as one reduction."""
    top, teacher_top = jnp.max(logits, -1), jnp.max(teacher, -1)
    q, p = jnp.exp(logits - top[:, None]), jnp.exp(teacher - teacher_top[:, None])
    q_sum, p_sum, difference = jax.lax.reduce(
        (q, p, p * (teacher - logits)),
        (jnp.float32(0),) * 3,
        lambda a, b: tuple(x + y for x, y in zip(a, b)),
        (1,),
    )
    return KLSums(top, q_sum, teacher_top, p_sum, difference)


def by_kernel(logits: jax.Array, teacher: jax.Array, **blocks: int) -> KLSums:
    return KLSums(*kl_sums_kernel(logits, teacher, **blocks))


BLOCKS = (1, 2048, 8), (2, 2048, 8), (4, 2048, 8), (4, 1024, 4), (8, 1024, 4), (4, 1024, 8), (4, 4096, 16)
SUMS: dict[str, Callable[[jax.Array, jax.Array], KLSums]] = {
    "sums by XLA": partial(kl_sums, implementation="xla"),
    "as one reduction": in_one_reduction,
    **{
        f"kernel, {at_once} x {block}, {warps} warps": partial(by_kernel, block=block, at_once=at_once, warps=warps)
        for at_once, block, warps in BLOCKS
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--mlp", type=int, default=8960)
    parser.add_argument("--words", type=int, default=151936)
    parser.add_argument("--chunk", type=int, default=2048)
    given = parser.parse_args()
    N, D, F, S = given.tokens, given.width, given.mlp, given.words
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {N} tokens", flush=True)
    keys = jax.random.split(jax.random.key(0), 5)
    x, kernel = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, [(N, D), (D, F)]))
    kernel *= D**-0.5
    ids = jnp.ones(N, jnp.int32)
    products = milliseconds(used(lambda gate, up, d, _: (gate, up, d)), x, kernel, ids)
    print(f"SwiGLU's gradient, at least {1e3 * 12 * N * F / BYTES:.2f} ms; its products alone {products:.2f} ms")
    for form in (as_jax_has_it, as_one_array, with_a_shared_operand):
        print(f"  {form.__name__:24} {milliseconds(used(form), x, kernel, ids) - products:8.2f} ms", flush=True)

    hidden, beside = (jax.random.normal(key, (1, N, D), jnp.bfloat16) for key in keys[2:4])
    heads = [0.02 * jax.random.normal(key, (D, S), jnp.bfloat16) for key in keys[3:]]

    def loss(hidden: jax.Array, head: jax.Array, beside: jax.Array, other: jax.Array) -> jax.Array:
        return losses.linear_kl(hidden, Head(head), beside, Head(other), jnp.ones((1, N)), chunk_tokens=given.chunk)

    logits = [2.0 * jax.random.normal(key, (given.chunk, S)) for key in keys[:2]]
    print(f"sums for the KL of {given.chunk} tokens, at least {1e3 * 8 * given.chunk * S / BYTES:.2f} ms")
    for name, sums in SUMS.items():
        print(f"  {name:24} {milliseconds(sums, *logits):8.2f} ms", flush=True)
    spent = milliseconds(jax.grad(loss, (0, 1)), hidden, heads[0], beside, heads[1])
    print(f"loss with head, products at least {1e3 * 8 * N * D * S / PRODUCTS:.0f} ms: {spent:.2f} ms", flush=True)

    sums = [jax.random.normal(key, (N, F), jnp.bfloat16) for key in keys[:2]]
    scales = [jnp.ones(size) for size in (N, F, F)]
    print(f"SwiGLU to float8, at least {1e3 * 5 * N * F / BYTES:.2f} ms")
    forms = {"XLA": partial(float8_swiglu, implementation="xla")} | {
        f"kernel, {block}, {warps} warps": partial(float8_swiglu_kernel, block=block, warps=warps)
        for block, warps in ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
    }
    for name, form in forms.items():
        print(f"  {name:24} {milliseconds(form, *sums, *scales):8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
