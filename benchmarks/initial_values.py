"""The alignment loss before the first step, for every way a linear mixer can start.

    python benchmarks/initial_values.py [--mixer gated_deltanet] [--teacher demo:smollm2-135m] [--steps 0]

A fresh mixer's gate and decays are not the teacher's; how far its output is from the teacher's before any training
says how much alignment has to repair. The zero gate gives no output: its loss is the size of the teacher's output,
and a start above it does harm first. With --steps, the loss after a few updates too.
Ways that a mixer refuses are named.
"""

import argparse
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.data import HeldoutBatches, open_source, open_tokens
from jaxhybrid.data.vocabulary import load_vocabulary
from jaxhybrid.errors import ConfigError
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.settings.stages import AlignConfig
from jaxhybrid.stages.align import align_loss, align_step, linear_mixers
from jaxhybrid.train.optimizer import make_optimizer, start
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_teacher

LENGTH, ROWS = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", default="gated_deltanet", choices=list(LINEAR_MIXERS))
    parser.add_argument("--teacher", default="demo:smollm2-135m", help="folder, hub id or demo:smollm2-135m")
    parser.add_argument("--text", default="pydoc", help="text source, as data.train of a run")
    parser.add_argument("--cache", default="~/.cache/jaxhybrid/tokens", help="folder of tokenised text")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens the loss is measured on")
    parser.add_argument("--steps", type=int, default=0, help="updates of 1024 tokens before the second measurement")
    arguments = parser.parse_args()

    teacher = load_teacher(arguments.teacher)
    vocabulary = load_vocabulary(teacher.folder, teacher.config.vocab_size)
    text = open_tokens(open_source(arguments.text), vocabulary, arguments.cache)
    wanted = arguments.tokens + arguments.steps * LENGTH * ROWS
    batches = list(HeldoutBatches(text, LENGTH, ROWS, wanted))
    measured, training = batches[: arguments.tokens // (LENGTH * ROWS)], batches[arguments.tokens // (LENGTH * ROWS) :]
    depth = teacher.config.num_layers
    settings = AlignConfig(
        tokens=max(arguments.steps, 1) * LENGTH * ROWS,
        sequence_length=LENGTH,
        batch_size=ROWS,
        learning_rate=2e-3,
        schedule="constant",
        warmup_steps=0,
    )

    heading = "| gate_init | decay_init | heads | loss before the first step |"
    print(heading + (f" after {arguments.steps} steps |" if arguments.steps else ""))
    print("|---|---|---|---|" + ("---|" if arguments.steps else ""))
    for gate, decay, expand in product(("random", "zero", "value"), ("fla", "slow"), (True, False)):
        try:
            mixer = LINEAR_MIXERS[arguments.mixer].Config(gate_init=gate, decay_init=decay, expand_kv=expand)
        except ConfigError as refused:
            print(f"| {gate} | {decay} | {'expanded' if expand else 'grouped'} | {refused} |", flush=True)
            continue
        student = convert(teacher, (mixer.kind,) * depth, mixer, jax.random.key(0))
        static = {"config": student.config, "dtype": jnp.float32}
        mixers = linear_mixers(student.params)
        optimizer = make_optimizer(settings, mixers)
        measure = jax.jit(lambda mixers, batch, static=static: align_loss(mixers, teacher, batch, **static))

        def mean_loss(mixers: dict, measure=measure) -> float:
            return float(np.mean([measure(mixers, batch) for batch in measured]))

        row = f"| {gate} | {decay} | {'expanded' if expand else 'grouped'} | {mean_loss(mixers):.3f} |"
        if arguments.steps:
            step = jax.jit(
                lambda state, batch, static=static, optimizer=optimizer: align_step(
                    state, teacher, batch, optimizer=optimizer, **static
                ),
                donate_argnums=0,
            )
            state = start(mixers, optimizer)
            for batch in training:
                state, _ = step(state, batch)
            row += f" {mean_loss(state.params):.3f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
