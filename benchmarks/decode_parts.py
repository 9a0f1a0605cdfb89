"""Parts of one decoded token's layer, each of many like it in turn: its time by XLA and by kernels.

    python benchmarks/decode_parts.py                            # all of them: some minutes
    python benchmarks/decode_parts.py "softmax token" state      # these

Parts are products with one row (inputs of linear and of softmax layers, output, gate and up, down), the `state` of a
linear layer, the `attention` of new queries to caches, and a `softmax token`: rotation, caches and attention. Every
form adds its row to --output (JSON); the fastest of each part are printed last. Times are medians of five.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxhybrid_kernels import Places, Steps, linear_attention_token, row_product
from jaxhybrid_kernels.gpu.attention_token import Blocks as TokenBlocks
from jaxhybrid_kernels.gpu.attention_token import attention_token
from jaxhybrid_kernels.gpu.decode_attention import Blocks as KeyBlocks
from jaxhybrid_kernels.gpu.decode_attention import decode_attention_kernel
from jaxhybrid_kernels.gpu.layer_token import Blocks as StateBlocks
from jaxhybrid_kernels.gpu.layer_token import token_kernel
from jaxhybrid_kernels.gpu.row_product import Blocks, row_product_kernel
from jaxhybrid_kernels.row_product import LONG_SUM
from output import Output
from shapes import SHAPES, asked_shape

from jaxhybrid.model.attention import written as with_token
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.rope import rotate
from jaxhybrid.model.softmax import plain_decode_attention

CACHED = 2**28  # bytes of matrices that are read in turn: more than a GPU's cache holds

# Division of products: (results, inputs, warps[, blocks ahead]) by how long the sum is.
SHORT_SUMS = [
    *(Blocks(results, inputs, 1) for results in (1, 2, 4, 8) for inputs in (256, 512)),
    *(Blocks(results, 512, 2) for results in (1, 2, 4, 8)),
    *(Blocks(*sizes) for sizes in ((4, 256, 1, 3), (4, 512, 1, 3), (8, 512, 4), (16, 512, 4), (8, 512, 4, 3))),
]
LONG_SUMS = [
    *(Blocks(results, 256 * warps, warps) for results in (1, 2, 4) for warps in (1, 2, 4, 8)),
    *(Blocks(results, 512 * warps, warps) for results in (1, 2, 4) for warps in (2, 4, 8)),
    *(Blocks(*sizes) for sizes in ((8, 512, 2), (8, 1024, 4), (8, 2048, 8), (2, 1024, 4, 3), (2, 2048, 8, 3))),
]
# Of a state's columns: (values, warps[, blocks ahead]).
COLUMNS = [
    StateBlocks(*sizes)
    for sizes in (
        (128, 8), (128, 16), (64, 4), (64, 8), (64, 4, 1), (64, 8, 1), (32, 2), (32, 4), (32, 8), (32, 4, 1),
        (32, 8, 1), (16, 2), (16, 4), (16, 4, 1), (16, 4, 2),
    )
]  # fmt: skip
# Of a cache: (keys at once, warps, stages, programs).
KEYS = [
    KeyBlocks(*sizes)
    for sizes in (
        (64, 4, 3, 528), (64, 4, 4, 528), (64, 4, 2, 1056), (64, 4, 3, 1056), (64, 4, 3, 2112), (64, 4, 3, 4224),
        (32, 4, 4, 528), (32, 4, 6, 1056), (32, 2, 4, 2112), (128, 4, 2, 528), (128, 8, 3, 264), (128, 8, 2, 1056),
    )
]  # fmt: skip
# Of caches beside a layer's projections: (keys at once, warps, programs[, stages, warps that join]).
TOKEN_KEYS = [
    TokenBlocks(*sizes)
    for sizes in (
        (16, 1, 64), (16, 2, 64), (16, 1, 128), (16, 4, 128), (32, 1, 64), (32, 2, 64), (32, 4, 64), (32, 4, 64, 2, 1),
        (32, 4, 64, 2, 8), (32, 2, 128), (32, 4, 32), (64, 4, 32), (64, 8, 32), (64, 4, 64), (64, 4, 128), (64, 4, 256),
        (64, 4, 256, 3), (128, 8, 64), (128, 8, 128, 3),
    )
]  # fmt: skip


class Case(NamedTuple):
    """One form of a part, for several layers in turn.

    Attributes:
        run: (written, given) -> as `written`, whose buffers it takes; or results, where `written` is empty.
        moved: bytes of one layer.
    """

    part: str
    form: str
    rows: int
    run: Callable[[Any, Any], Any]
    written: list[Any]
    given: list[Any]
    moved: int


def product_cases(shape: ModelConfig) -> Iterator[Case]:
    D, F, N, K, G = shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.head_dim, shape.num_kv_heads
    for part, outputs, inputs, gated, normed in (
        ("inputs, linear", 4 * N * K + 2 * N, D, False, True),
        ("inputs, softmax", (N + 2 * G) * K, D, False, True),
        ("output", D, N * K, False, False),
        ("gate and up", 2 * F, D, True, True),
        ("down", D, F, False, False),
    ):
        scale, moved = jnp.ones(inputs, jnp.bfloat16), 2 * outputs * inputs
        residual = None if normed else jnp.ones((1, outputs), jnp.bfloat16)
        given = [
            (jnp.ones((1, inputs), jnp.bfloat16), jnp.zeros((outputs, inputs), jnp.bfloat16))
            for _ in range(max(2, CACHED // moved))
        ]
        norm = (scale, 1e-6) if normed else None
        forms: dict[str, Callable[..., Any]] = {
            "xla": partial(row_product, norm=norm, gated=gated, residual=residual, implementation="xla")
        }
        for blocks in SHORT_SUMS if inputs < LONG_SUM else LONG_SUMS:
            if outputs // (2 if gated else 1) % blocks.outputs == 0:
                forms[str(tuple(blocks))] = partial(
                    row_product_kernel, bias_O=None, scale_D=scale if normed else None, eps=1e-6, residual_1O=residual,
                    gated=gated, dtype=jnp.bfloat16, blocks=blocks, interpret=False,
                )  # fmt: skip
        for form, product in forms.items():
            product = jax.jit(product)  # many calls are traced once
            run = lambda _, given, product=product: [product(*pair) for pair in given]  # noqa: E731
            yield Case(part, form, 1, run, [], given, moved)


def state_cases(shape: ModelConfig) -> Iterator[Case]:
    N, K = shape.num_heads, shape.head_dim
    gates, scale = Steps(4 * N * K, 4 * N * K + N, jnp.zeros(N), jnp.zeros(N)), jnp.ones(K)
    places = Places(0, N, 2 * N, 3 * N)
    forms: dict[str, Callable[..., Any]] = {
        "xla": partial(
            linear_attention_token, places=places, gates=gates, silu=True,
            out_norm=(scale, 1e-6), norm_eps=1e-6, dtype=jnp.bfloat16, implementation="xla",
        )
    }  # fmt: skip
    for columns in COLUMNS:
        forms[str(tuple(columns))] = partial(
            token_kernel, places=places, gates=gates, silu=True, out_scale_V=scale, out_eps=1e-6,
            norm_eps=1e-6, dtype=jnp.bfloat16, blocks=columns, interpret=False,
        )  # fmt: skip
    for rows, count in ((1, 160), (64, 3)):
        projections = [jnp.ones((rows, 4 * N * K + 2 * N)) for _ in range(count)]
        for form, token in forms.items():
            token, states = jax.jit(token), [jnp.zeros((rows, N, K, K)) for _ in range(count)]

            def run(states: Any, given: Any, token: Any = token) -> Any:
                return [token(y, state_BNKV=state)[1] for y, state in zip(given, states)]

            yield Case("state", form, rows, run, states, projections, 2 * states[0].nbytes)


def attention_cases(shape: ModelConfig) -> Iterator[Case]:
    N, K, G = shape.num_heads, shape.head_dim, shape.num_kv_heads
    for rows, context in ((1, 1024), (1, 65536), (64, 32768)):
        last = jnp.full(rows, context - 1, jnp.int32)
        caches = [[jnp.zeros((rows, G, context, K), jnp.bfloat16) for _ in "kv"] for _ in range(2)]
        plain = [(jnp.ones((rows, N, K), jnp.bfloat16), *cache) for cache in caches]
        grouped = [(q.reshape(rows, G, -1, K), k, v) for q, k, v in plain]
        forms: dict[str, Callable[..., Any]] = {"xla": partial(plain_decode_attention, last=last)}
        for keys in KEYS:
            forms[str(tuple(keys))] = partial(decode_attention_kernel, last=last, blocks=keys)
        for form, attend in forms.items():
            run = lambda _, given, attend=attend: [attend(*one) for one in given]  # noqa: E731
            given, moved = plain if form == "xla" else grouped, sum(cache.nbytes for cache in caches[0])
            yield Case(f"attention, {context}", form, rows, run, [], given, moved)


def softmax_token_cases(shape: ModelConfig) -> Iterator[Case]:
    N, K, G = shape.num_heads, shape.head_dim, shape.num_kv_heads
    places, rotation = Places(0, N, N + G), (jnp.ones((1, K // 2)), jnp.zeros((1, K // 2)))
    for context in (1024, 8192, 32768):
        index, moved = jnp.full(1, context - 2, jnp.int32), 2 * 2 * G * context * K
        projections = [jnp.ones((1, (N + 2 * G) * K)) for _ in range(max(4, CACHED // 2 // moved))]

        def by_xla(row: Any, *, k_BGMK: Any, v_BGMK: Any, index: Any = index) -> Any:
            q, k, v = jnp.split(row.astype(k_BGMK.dtype).reshape(1, 1, -1, K), (N, N + G), axis=2)
            q, k = (rotate(x, *(table[:, None] for table in rotation)) for x in (q, k))
            own = with_token({"k": k_BGMK, "v": v_BGMK}, {"k": k, "v": v}, index)
            return plain_decode_attention(q[:, 0], own["k"], own["v"], index).reshape(1, -1), own["k"], own["v"]

        forms: dict[str, Callable[..., Any]] = {"xla": by_xla}
        for blocks in TOKEN_KEYS:
            forms[str(tuple(blocks))] = partial(
                attention_token, places=places, rotation=rotation, index_B=index, heads=N, scale=K**-0.5,
                dtype=jnp.bfloat16, blocks=blocks,
            )  # fmt: skip
        for form, token in forms.items():
            token = jax.jit(token)
            # Results and caches; a result that nobody takes would not be computed.
            layers = [
                (jnp.zeros((1, N * K), jnp.bfloat16), *(jnp.zeros((1, G, context, K), jnp.bfloat16) for _ in "kv"))
                for _ in projections
            ]

            def run(layers: Any, given: Any, token: Any = token) -> Any:
                return [token(row, k_BGMK=k, v_BGMK=v) for row, (_, k, v) in zip(given, layers)]

            yield Case(f"softmax token, {context}", form, 1, run, layers, projections, moved)


def compiled(case: Case) -> Any:
    """The case's program, or why there is none."""
    try:
        return jax.jit(case.run, donate_argnums=0).lower(case.written, case.given).compile()
    except jax.errors.JaxRuntimeError as error:  # more registers or shared memory than there is
        return str(error)[:200]


def seconds_of_a_layer(case: Case, program: Any) -> float:
    written, times = case.written, []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10):
            found = program(written, case.given)
            written = found if written else written
        jax.block_until_ready(found)
        times.append((time.perf_counter() - began) / 10 / len(case.given))
    return float(np.median(times[1:]))


PARTS = {
    "inputs, linear": product_cases, "inputs, softmax": product_cases, "output": product_cases,
    "gate and up": product_cases, "down": product_cases, "state": state_cases, "attention": attention_cases,
    "softmax token": softmax_token_cases,
}  # fmt: skip


def measure(shape: ModelConfig, options: argparse.Namespace, output: Output) -> None:
    parts = options.parts or list(PARTS)
    makers = dict.fromkeys(PARTS[name] for name in parts)
    cases = [case for maker in makers for case in maker(shape) if case.part.startswith(tuple(parts))]
    with ThreadPoolExecutor(12) as pool:
        programs = list(pool.map(compiled, cases))
    found: dict[str, list[tuple[float, str]]] = {}
    for case, program in zip(cases, programs):
        if isinstance(program, str):
            print(f"{case.part}, {case.rows} rows, {case.form}: {program}", flush=True)
            continue
        seconds = seconds_of_a_layer(case, program)
        row = {"us": 1e6 * seconds, "of_bandwidth": case.moved / seconds / options.bandwidth}
        output.add(case.part, shape=options.shape, form=case.form, rows=case.rows, **row)
        found.setdefault(f"{case.part}, {case.rows} rows", []).append((row["us"], case.form))
    for name, times in found.items():
        print(f"{name}: " + "; ".join(f"{form} {us:.1f} us" for us, form in sorted(times)[:6]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", choices=[[], *PARTS],  # [] is none of them
        help=f"some of {', '.join(map(repr, PARTS))}",
    )  # fmt: skip
    parser.add_argument(
        "--shape", default="qwen2.5-1.5b-instruct", help=f"one of {', '.join(SHAPES)}, or a folder with a config.json"
    )
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second: what an H200 reaches")
    parser.add_argument("--output", type=Path, default=Path("decode_parts.json"))
    options = parser.parse_args()
    shape = asked_shape(parser, options.shape)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.shape}", flush=True)
    measure(shape, options, Output(options.output, ("part", "shape", "form", "rows")))


if __name__ == "__main__":
    main()
