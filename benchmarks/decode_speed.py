"""Decoding and prefill of a teacher and its hybrids: tokens a second, memory, the longest context, beside the floor.

    python benchmarks/decode_speed.py floor                          # one text: tokens/s against memory bandwidth
    python benchmarks/decode_speed.py batch                          # 64 texts of 32k tokens: hybrid against teacher
    python benchmarks/decode_speed.py longest                        # the longest context that fits, by trying
    python benchmarks/decode_speed.py contexts --models teacher      # 1k to 256k tokens; one model a call: some minutes
    python benchmarks/decode_speed.py contexts --models 0.125 0.25 0.5
    python benchmarks/decode_speed.py transformers                   # `generate` of transformers on the exported folder
    python benchmarks/decode_speed.py plot --images docs/images      # of what the other parts wrote

A model is `teacher` or the share of its layers that stay softmax, evenly; the others are Gated DeltaNet. Weights are
random and in bfloat16. Every part adds its rows to --output (JSON) as it goes, so that parts can run one by one.

`floor` is what must be moved for a token: all weights once, each memory once in and once out, and the filled part of
the caches once, at --bandwidth. In `floor`, `batch` and `longest` caches and memories are empty but count as full,
which changes no speed. Times are medians of calls of 32 tokens with what the host does between them; the first two
calls are not counted. `stacks` is the same step with each layer's weights sliced out of the stacks inside the program.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # before JAX starts: all of the card but a rest

import jax
import jax.numpy as jnp
import numpy as np
from jaxhybrid_kernels import linear_attention_token, row_product
from jaxhybrid_kernels.gpu import attention_token
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from output import Output
from shapes import SHAPES, asked_shape

from jaxhybrid.decoding import engine as programs
from jaxhybrid.decoding.engine import Engine, Request
from jaxhybrid.model import decode
from jaxhybrid.model.attention import written as with_token
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.softmax import plain_decode_attention
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.selection.methods import layer_types, select_layers
from jaxhybrid.weights.convert import convert

MIXER = GatedDeltaNetConfig()
TEACHER = "teacher"
STEPS = 32
GIB = 2**30


def made(shape: ModelConfig, name: str) -> Model:
    """The teacher with random weights in bfloat16, or a hybrid of it."""

    def params(key: jax.Array) -> Model:
        model = Model(random_params(shape, key), shape)
        if name != TEACHER:
            kept = select_layers("uniform", shape.num_layers, float(name))
            model = convert(model, layer_types(shape.num_layers, kept, MIXER.kind), MIXER, key)
        return model.cast(jnp.bfloat16)

    return jax.block_until_ready(jax.jit(params)(jax.random.key(0)))


def opened(shape: ModelConfig, name: str, slots: int) -> Engine:
    return Engine(made(shape, name), slots, dtype=jnp.bfloat16, consume=True)


def pretend(engine: Engine, context: int, new: int) -> None:
    """All slots hold texts of `context` tokens, whose states are whatever there is."""
    engine.reserve(context + new)
    engine.texts = {slot: [1] * context for slot in range(engine.slots)}
    request = Request([1] * context, new)
    engine.requests = dict.fromkeys(engine.texts, request)


def seconds_per_call(engine: Engine, calls: int) -> float:
    times = []
    for _ in range(calls + 2):
        began = time.perf_counter()
        engine.step(STEPS)
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def floor_bytes(engine: Engine, context: int) -> dict[str, int]:
    """What a step must move, in bytes: of weights, memories and caches."""
    model, kinds = engine.model, engine.model.config.layer_types
    head = model.ends["embed" if model.config.tie_embeddings else "head"]
    memories = [state for state, kind in zip(engine.states, kinds) if kind != FULL_ATTENTION]
    caches = [state for state, kind in zip(engine.states, kinds) if kind == FULL_ATTENTION]
    return {
        "weights": nbytes(model.layers) + nbytes(head) + nbytes(model.ends["final_norm"]),
        "memories": 2 * nbytes(memories),
        "caches": nbytes(caches) * context // max(engine.capacity, 1),
    }


def in_use() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    names = {"in_use_gib": "bytes_in_use", "peak_gib": "peak_bytes_in_use"}
    return {name: stats[key] / GIB for name, key in names.items() if key in stats}


def decoding_row(engine: Engine, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """Speed of the texts that are in the slots."""
    seconds = seconds_per_call(engine, options.calls) / STEPS
    moved = floor_bytes(engine, context)
    floor = sum(moved.values()) / options.bandwidth
    return {
        "rows": engine.slots, "context": context, "capacity": engine.capacity, "ms_per_token": 1e3 * seconds,
        "tokens_per_second": engine.slots / seconds, "floor_ms": 1e3 * floor, "of_floor": floor / seconds,
        "state_gib": nbytes(engine.states) / GIB, **{f"{name}_gib": size / GIB for name, size in moved.items()},
        **in_use(),
    }  # fmt: skip


ROW = ("part", "shape", "model", "form", "rows", "context")  # what tells one row from another


# --- parts


def step_hlo(engine: Engine) -> str:
    rows = engine._rows(dict.fromkeys(engine.busy, STEPS), [programs.GREEDY] * engine.slots)
    return programs._steps.lower(engine.model, engine.states, rows, steps=STEPS, drawn=False).compile().as_text()


def large_moves(hlo: str, least: int = 2**20) -> list[str]:
    """Copies, slices and transpositions of arrays with so many elements that are in a program, fused ones too."""
    found = re.findall(r"= (\w+\[[\d,]+\])\S* (copy|slice|dynamic-slice|transpose|concatenate)\(", hlo)
    return sorted({f"{name} {shape}" for shape, name in found
                   if np.prod([int(n) for n in re.findall(r"\d+", shape.partition("[")[2])]) >= least})  # fmt: skip


def launches(hlo: str) -> dict[str, int]:
    """What the body of a program's largest loop, a step, launches: how many of each kind."""
    bodies = [hlo.partition(f"\n%{name} (")[2].partition("\n}")[0] for name in re.findall(r"body=%([\w.-]+)", hlo)]
    kinds = re.findall(r" (fusion|custom-call|copy|sort|while|conditional|call)\(", max(bodies, key=len, default=""))
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def floor(options: argparse.Namespace, output: Output) -> None:
    context = options.context or 1024
    for name in options.models or [TEACHER, "0.25"]:
        engine = opened(options.shape, name, options.rows or 1)
        pretend(engine, context - STEPS * (options.calls + 2), STEPS * (options.calls + 2))
        if options.hlo:
            hlo = step_hlo(engine)
            print(f"{name}: a step launches {launches(hlo)}; large copies: {large_moves(hlo) or 'none'}", flush=True)
        output.add(
            "floor", shape=options.shape_name, model=name, form="layers", **decoding_row(engine, context, options)
        )
        if options.stacks:
            engine.model = None  # type: ignore[assignment]
            stacked = made(options.shape, name)
            engine.model = jax.eval_shape(lambda m: decode.unstack(m, jnp.bfloat16), stacked)
            pretend(engine, context - STEPS * (options.calls + 2), STEPS * (options.calls + 2))
            sliced, engine.states = seconds_of_stacks(engine, stacked, options.calls), ()
            row = {"rows": engine.slots, "context": context, "ms_per_token": 1e3 * sliced / STEPS}
            output.add("floor", shape=options.shape_name, model=name, form="stacks", **row)


def seconds_of_stacks(engine: Engine, model: Model, calls: int) -> float:
    """A call of the step that slices each layer's weights out of the stacks."""

    @partial(jax.jit, donate_argnums=1)
    def steps(model: Model, states: Any, rows: Any) -> Any:
        return programs._steps(decode.unstack(model, jnp.bfloat16), states, rows, steps=STEPS, drawn=False)

    rows = engine._rows(dict.fromkeys(engine.busy, STEPS), [programs.GREEDY] * engine.slots)
    states, times = engine.states, []
    for _ in range(calls + 2):
        began = time.perf_counter()
        tokens, states = steps(model, states, rows)
        np.asarray(tokens)
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def batch(options: argparse.Namespace, output: Output) -> None:
    context, rows, speeds = options.context or 32768, options.rows or 64, {}
    for name in options.models or [TEACHER, "0.25"]:
        engine = opened(options.shape, name, rows)
        pretend(engine, context - STEPS * (options.calls + 2), STEPS * (options.calls + 2))
        row = decoding_row(engine, context, options)
        speeds[name] = row["tokens_per_second"]
        output.add("batch", shape=options.shape_name, model=name, **row)
        del engine
    if TEACHER in speeds:
        print("times the teacher's speed: " + ", ".join(f"{n} {s / speeds[TEACHER]:.2f}" for n, s in speeds.items()))


def longest(options: argparse.Namespace, output: Output) -> None:
    """The caches' sizes are 2^k and 3 * 2^k: the largest that the arithmetic allows, then its neighbours by trying."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", options.memory * GIB)
    for name in options.models or [TEACHER, "0.25"]:
        engine = opened(options.shape, name, options.rows or 1)
        states = (programs._initial_states(engine.model.config, engine.slots, n, engine.dtype) for n in (1, 2))
        one, two = map(nbytes, states)
        weights, per_token = nbytes(engine.model), two - one
        by_size = int((limit - weights - one) // per_token)
        fits, capacity = 0, programs.rounded(by_size)
        while capacity > by_size:
            capacity = smaller(capacity)
        while capacity >= programs.CAPACITY:
            worked = tried(engine, capacity)
            print(f"{name}: {engine.slots} x {capacity:,} tokens {'fit' if worked else 'do not fit'}", flush=True)
            if worked:
                fits, capacity = capacity, programs.rounded(capacity + 1)
            elif fits:
                break
            else:
                capacity = smaller(capacity)
            if capacity <= fits or (fits and capacity > by_size):
                break
        row = {"rows": engine.slots, "weights_gib": weights / GIB, "bytes_per_token": per_token, "by_size": by_size}
        output.add("longest", shape=options.shape_name, model=name, fits=fits, **row)
        del engine


def smaller(capacity: int) -> int:
    """The size before one of 2^k or 3 * 2^k."""
    return capacity * 3 // 4 if capacity & (capacity - 1) == 0 else capacity * 2 // 3


def tried(engine: Engine, capacity: int) -> bool:
    engine.states, engine.capacity, engine.texts, engine.requests = (), 0, {}, {}
    try:
        pretend(engine, capacity - STEPS, STEPS)
        engine.step(STEPS)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def contexts(options: argparse.Namespace, output: Output) -> None:
    for name in options.models or [TEACHER, "0.125", "0.25", "0.5"]:
        engine = opened(options.shape, name, options.rows or 1)
        for context in options.contexts:
            rng = np.random.default_rng(0)
            new = STEPS * (options.calls + 2)
            prompt = rng.integers(0, options.shape.vocab_size, context - new).tolist()
            for _ in range(2):  # the first compiles
                for slot in engine.busy:
                    engine.stop(slot)
                began = time.perf_counter()
                engine.prefill({slot: Request(prompt, new) for slot in range(engine.slots)})
                jax.block_until_ready(engine.states)
                seconds = time.perf_counter() - began
            rate = engine.slots * len(prompt) / seconds
            row = decoding_row(engine, context, options)
            output.add(
                "contexts", shape=options.shape_name, model=name, prefill_seconds=seconds,
                prefill_tokens_per_second=rate, **row,
            )  # fmt: skip
        del engine


def compiled_for_one_token(forward: Callable[..., Any], compile_: Callable[..., Any]) -> Callable[..., Any]:
    """Prompts are read as before."""
    compiled = compile_(forward, dynamic=False)

    @wraps(forward)  # transformers looks at the names of its arguments
    def chosen(*arguments: Any, **given: Any) -> Any:
        tokens = given["input_ids"] if "input_ids" in given else arguments[0]
        return (compiled if tokens.shape[1] == 1 else forward)(*arguments, **given)

    return chosen


def in_transformers(options: argparse.Namespace, output: Output) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        print(f"transformers: skipped, {error.name} is not installed")
        return
    if not torch.cuda.is_available():
        print("transformers: skipped, torch sees no GPU")
        return
    from jaxhybrid.export.folder import export

    context, new = options.context or 1024, STEPS * options.calls
    for name in options.models or ["0.25"]:
        with tempfile.TemporaryDirectory() as folder:
            path = export(made(options.shape, name), Path(folder) / "export")
            model = (
                AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.bfloat16).cuda().eval()
            )
        tokens = torch.randint(0, options.shape.vocab_size, (options.rows or 1, context - new), device="cuda")
        for form, cache in (("dynamic", {}), ("static, compiled", {"cache_implementation": "static"})):
            if cache:
                model.forward = compiled_for_one_token(model.forward, torch.compile)

            def run(new: int, cache: Any = cache, model: Any = model, tokens: Any = tokens) -> float:
                began = time.perf_counter()
                model.generate(tokens, do_sample=False, eos_token_id=None, max_new_tokens=new, **cache)
                torch.cuda.synchronize()
                return time.perf_counter() - began

            try:
                run(new), run(1)
                seconds = (run(new) - run(1)) / (new - 1)
            except Exception as error:  # a benchmark of another library's paths: what fails is said
                print(f"transformers, {form}: failed, {type(error).__name__}: {str(error)[:300]}")
                continue
            row = {"rows": len(tokens), "context": context, "ms_per_token": 1e3 * seconds}
            output.add("transformers", shape=options.shape_name, model=name, form=form, **row,
                       tokens_per_second=len(tokens) / seconds)  # fmt: skip


# --- plots


def crossover(own: dict[int, float], other: dict[int, float]) -> str:
    """From which context on `own` is more than `other`, of values by context: where their lines in the plot, straight
    between what was measured on logarithmic axes, cross last."""
    places = sorted(own.keys() & other.keys())
    leads = [float(np.log(own[place] / other[place])) for place in places]
    behind = [number for number, lead in enumerate(leads) if lead <= 0]
    if not places:
        return "is not known: no context was measured for both"
    if not behind:
        return f"at every context from {places[0]:,} tokens"
    if (last := behind[-1]) + 1 == len(places):
        return f"nowhere up to {places[-1]:,} tokens"
    low, high = np.log(places[last : last + 2])
    crossed = np.exp(low + (high - low) * leads[last] / (leads[last] - leads[last + 1]))
    return f"from about {float(f'{crossed:.2g}'):,.0f} tokens"


def plot(options: argparse.Namespace, output: Output) -> None:
    """Prefill and decoding speed and the state's memory by context, a line for each model."""
    from jaxhybrid.report.plots import COLOURS, plot_style

    rows = [row for row in output.read() if row["part"] == "contexts" and row["shape"] == options.shape_name]
    if not rows:
        raise SystemExit(f"{output.path} has no rows of the part `contexts` for {options.shape_name}; run it first.")
    panels = {
        "decode-speed": ("tokens_per_second", "tokens a second", "Decoding", "faster"),
        "prefill-speed": ("prefill_tokens_per_second", "tokens a second", "Reading a prompt", "faster"),
        "decode-memory": ("state_gib", "GiB", "Caches and memories", "less"),
    }
    names = list(dict.fromkeys(row["model"] for row in rows))
    with plot_style():
        for file, (key, unit, title, better) in panels.items():
            figure = Figure(figsize=(9.0, 4.0), layout="constrained")
            axes = figure.subplots()
            curves = {name: {row["context"]: row[key] for row in rows if row["model"] == name} for name in names}
            for name, colour in zip(names, COLOURS):
                label = TEACHER if name == TEACHER else f"{100 * float(name):g} % softmax"
                if name != TEACHER and TEACHER in curves:
                    pair = (curves[name], curves[TEACHER]) if better == "faster" else (curves[TEACHER], curves[name])
                    label += f", {better} than the teacher {crossover(*pair)}"
                    print(f"{title}: {label}")
                axes.plot(*zip(*sorted(curves[name].items())), marker="o", color=colour, label=label)
            axes.set(
                xscale="log", yscale="log", xlabel="context, tokens", ylabel=unit, title=f"{title}: {rows[0]['device']}"
            )
            places = sorted({row["context"] for row in rows})
            axes.set_xticks(places, [f"{place / 1024:g}k" for place in places], minor=False)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))  # a narrow range may hold no power of ten
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.legend()
            path = options.images / f"{file}.png"
            figure.savefig(path)
            print(path)


KERNELS = {"row_product": sys.modules[row_product.__module__], "token": sys.modules[linear_attention_token.__module__],
           "attention": sys.modules[plain_decode_attention.__module__],
           "attention_token": sys.modules[with_token.__module__]}  # fmt: skip
PARTS: dict[str, Callable[[argparse.Namespace, Output], None]] = {
    "floor": floor, "batch": batch, "longest": longest, "contexts": contexts,
    "transformers": in_transformers, "plot": plot,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument(
        "--shape", dest="shape_name", default="qwen2.5-1.5b-instruct",
        help=f"one of {', '.join(SHAPES)}, or a folder with a config.json",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", help="teacher, or a share of softmax layers such as 0.25")
    parser.add_argument("--rows", type=int, help="texts at once; by part 1 or 64")
    parser.add_argument("--context", type=int, help="tokens of a text at its end; by part 1024 or 32768")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384, 65536, 262144])
    parser.add_argument("--calls", type=int, default=5, help="calls of 32 tokens that are timed")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second: what an H200 reaches")
    parser.add_argument("--memory", type=float, default=8, help="GiB, where the device does not say")
    parser.add_argument("--stacks", action="store_true", help="floor: also with weights sliced out of stacks")
    parser.add_argument(
        "--no-hlo", dest="hlo", action="store_false", help="floor: do not look for copies in the program"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=KERNELS, help="kernels in whose place XLA's programs run"
    )
    parser.add_argument(
        "--read-on", type=float, nargs=2, metavar=("PRODUCTS", "BETWEEN"),
        help="MiB that an input product and a kernel between two products read of what comes next",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("decode_speed.json"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.shape = asked_shape(parser, options.shape_name)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.shape_name}", flush=True)
    for name in options.without:
        KERNELS[name].on_nvidia = lambda: False  # type: ignore[attr-defined]
    if options.read_on is not None:
        of_products, between = (int(2**20 * size) for size in options.read_on)
        for module, names, limit in (
            (KERNELS["row_product"], ("SHORT", "LONG"), of_products),
            (KERNELS["token"], ("FEW",), between),
            (attention_token, ("SHORT",), between),
        ):
            for name in names:
                setattr(module, name, getattr(module, name)._replace(read_on=limit))
    for part in options.parts:
        print(f"--- {part}", flush=True)
        PARTS[part](options, Output(options.output, ROW))


if __name__ == "__main__":
    main()
