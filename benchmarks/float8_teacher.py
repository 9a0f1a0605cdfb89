"""What a teacher loses whose MLPs multiply in float8: its own figures, and those of students distilled from it.

    python benchmarks/float8_teacher.py configs/demo.yaml                      # SmolLM2-135M, on a CPU too
    python benchmarks/float8_teacher.py configs/qwen2.5-1.5b-instruct.yaml data.train='/text/*.parquet'

    # Students, on a GPU; study_rows.py writes the text.
    python benchmarks/float8_teacher.py configs/smollm2-135m.yaml --text rows.npz --tokens 65536 --rows 16 \\
        --align 480 --distill 800 --seeds 0 1

Teacher and text are the config's, the text held out. The first table compares forward passes of the teacher with the
one in float32, by token: KL(float32, other) in nats, how often both find the same next token most likely, and
perplexity. Numbers are rounded to float8 alike everywhere, but GPUs add up products with fewer bits, so a table is of
its device.

With `--distill` a student with every fourth layer softmax is aligned for `--align` steps of the config's alignment, and
distilled from there, on the same batches, from each teacher: as it is, with distill.float8_teacher, and with
align.float8_teacher, too. The second table has each student's KL from the teacher as it is, in the config's dtype, on
the held-out text. More `--seeds` tell how far apart students are whose text comes in another order. One device.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from students import ConfigText, FileText, Students, last_quarter, say

from jaxhybrid.losses import next_token_targets
from jaxhybrid.model.head import Head, in_chunks, own_columns
from jaxhybrid.model.transformer import Model, outputs
from jaxhybrid.settings.read import load_config
from jaxhybrid.stages.batch import Batch, token_mask
from jaxhybrid.weights.huggingface import load_teacher

TOKENS_AT_ONCE = 256  # whose logits are held, of both models


def compared(expected: tuple[jax.Array, Head], model: Model, batch: Batch, dtype: Any) -> jax.Array:
    """Sums over a batch: KL(expected, model), tokens with the same most likely successor, tokens, cross entropy,
    predicted tokens."""
    own = outputs(model, batch["tokens"], batch["segment_ids"], dtype=dtype)
    targets, predicted = next_token_targets(batch["tokens"], batch["segment_ids"])
    words = model.config.vocab_size
    theirs, ours = own_columns(expected[1], words, expected[0].dtype), own_columns(own[1], words, dtype)

    def compare(chunk: tuple[jax.Array, ...]) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            log_p = jax.nn.log_softmax(theirs.logits(chunk[0], words))
        log_q = jax.nn.log_softmax(ours.logits(chunk[1], words))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        same = (jnp.argmax(log_p, -1) == jnp.argmax(log_q, -1)).astype(kl.dtype)
        return jnp.stack([kl, same, -jnp.take_along_axis(log_q, chunk[2][:, None], -1)[:, 0]], -1)

    flat = tuple(x.reshape(-1, *x.shape[2:]) for x in (expected[0], own[0], targets))
    found = jax.lax.map(compare, in_chunks(flat, TOKENS_AT_ONCE)).reshape(-1, 3)[: targets.size]
    kl, same, surprise = jnp.moveaxis(found.reshape(*targets.shape, 3), -1, 0)
    tokens = token_mask(batch["segment_ids"])
    return jnp.stack([jnp.sum(x) for x in (kl * tokens, same * tokens, tokens, surprise * predicted, predicted)])


def exact_outputs(teacher: Model, batch: Batch) -> tuple[jax.Array, Head]:
    with jax.default_matmul_precision("highest"):
        return outputs(teacher, batch["tokens"], batch["segment_ids"], dtype=jnp.float32)


def forms_table(teacher: Model, batches: list[Batch]) -> str:
    """Of every form of the teacher's forward pass."""
    forms = {
        "float32, MLPs in float8": (teacher.in_float8(), jnp.float32),
        "bfloat16": (teacher, jnp.bfloat16),
        "bfloat16, MLPs in float8": (teacher.in_float8(), jnp.bfloat16),
    }
    expect, measure = jax.jit(exact_outputs), jax.jit(compared, static_argnames="dtype")
    sums = {"float32": np.zeros(5)} | {name: np.zeros(5) for name in forms}
    for batch in batches:
        expected = expect(teacher, batch)
        with jax.default_matmul_precision("highest"):
            sums["float32"] += np.asarray(measure(expected, teacher, batch, dtype=jnp.float32), np.float64)
        for name, (model, dtype) in forms.items():
            sums[name] += np.asarray(measure(expected, model, batch, dtype=dtype), np.float64)
    lines = ["| forward pass | KL from float32 | same most likely token | perplexity |", "|---|---|---|---|"]
    for name, (kl, same, tokens, surprise, predicted) in sums.items():
        lines.append(
            f"| {name} | {kl / tokens:.5f} | {100 * same / tokens:.2f} % | {math.exp(surprise / predicted):.3f} |"
        )
    return "\n".join(lines)


def students_table(students: Students, batches: list[Batch], options: argparse.Namespace) -> str:
    """Of students distilled from both forms of their teacher."""
    forms = [("the teacher as it is", False, False), ("MLPs in float8", False, True)]
    if options.align:
        forms.append(("alignment, too", True, True))
    aligned = {
        float8: students.aligned(options.align, float8_teacher=float8) for float8 in {aligns for _, aligns, _ in forms}
    }
    expect, measure = jax.jit(exact_outputs), jax.jit(compared, static_argnames="dtype")
    expected = [expect(students.teacher, batch) for batch in batches]
    lines = [
        "| taught by | seed | loss while taught | KL from the teacher as it is | perplexity |",
        "|---" * 5 + "|",
    ]
    for seed in options.seeds:
        for name, aligns_in_float8, float8 in forms:
            student = aligned[aligns_in_float8]
            params, losses = students.trained("distill", student, options.distill, seed, float8_teacher=float8)
            model = replace(student, params=params)
            sums = np.zeros(5)
            for given, batch in zip(expected, batches):
                sums += np.asarray(measure(given, model, batch, dtype=students.dtype), np.float64)
            kl, _, tokens, surprise, predicted = sums
            loss, perplexity = last_quarter(losses), math.exp(surprise / predicted)
            lines.append(f"| {name} | {seed} | {loss:.5f} | {kl / tokens:.5f} | {perplexity:.3f} |")
            say(lines[-1])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="whose teacher, text, mixer and stages are taken")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE over the config")
    parser.add_argument("--text", type=Path, help="what study_rows.py wrote, in place of the config's data")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens that are measured on")
    parser.add_argument("--length", type=int, default=512, help="of their rows; those of --text have their own")
    parser.add_argument("--rows", type=int, default=2, help="at once")
    parser.add_argument("--distill", type=int, metavar="STEPS", help="distil students, too")
    parser.add_argument("--align", type=int, default=0, metavar="STEPS", help="before that")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the order of text to distil on")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.settings)
    teacher = load_teacher(config.teacher, jnp.float32, ignore_config_keys=config.ignore_config_keys)
    text = FileText(options.text) if options.text else ConfigText(config, teacher)
    batches = list(map(jax.device_put, text.heldout(options)))
    tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in batches)
    say(f"{config.teacher}, {tokens:,} held-out tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(forms_table(teacher, batches), flush=True)
    if options.distill:
        print(students_table(Students(config, teacher, text), batches, options))


if __name__ == "__main__":
    main()
