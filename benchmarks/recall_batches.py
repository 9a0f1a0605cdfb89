"""How much faster answers come when prompts are read and written in batches instead of one at a time.

    python benchmarks/recall_batches.py                       # a small model with random weights
    python benchmarks/recall_batches.py demo:smollm2-135m --prompts 8

Two ways of asking: the recall probe, whose answers are all read in one pass over a batch of prompts, against a prompt
of its own for each question, whose answer is written token by token; and a needle in a haystack, written in batches
against one prompt at a time. Each form has one shape, is compiled before the clock starts, and must give the same
answers as the other.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.data.vocabulary import Vocabulary, load_vocabulary
from jaxhybrid.decoding.generate import generate
from jaxhybrid.evaluate.answers import NO_TOKEN, is_answer, read_answers
from jaxhybrid.evaluate.prompts import Asker, PromptSet
from jaxhybrid.evaluate.recall_prompts import RecallTask, recall_task
from jaxhybrid.evaluate.ruler import ruler_prompts
from jaxhybrid.evaluate.written import write_answers
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.settings.evaluate import RulerConfig
from jaxhybrid.weights.convert import convert
from jaxhybrid.weights.huggingface import load_teacher, open_teacher


def small_hybrid(vocab_size: int) -> Model:
    """Four layers, one of them softmax."""
    config = ModelConfig(
        family="llama", vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_layers=4, num_heads=4,
        num_kv_heads=2, head_dim=16, norm_eps=1e-5, max_position_embeddings=4096, tie_embeddings=True,
    )  # fmt: skip
    teacher = Model(jax.jit(lambda key: random_params(config, key))(jax.random.key(0)), config)
    types = ("gated_deltanet", "gated_deltanet", FULL_ATTENTION, "gated_deltanet")
    return convert(teacher, types, GatedDeltaNetConfig(), jax.random.key(1))


def timed(work: Callable[[int], Any], prompts: int, warm: int) -> tuple[Any, float]:
    """What `work` gives for so many prompts, and its seconds; once before for `warm` of them, which compiles."""
    work(warm)
    began = time.perf_counter()
    return work(prompts), time.perf_counter() - began


def probe(model: Model, task: RecallTask, alone: int) -> tuple[float, float]:
    """Seconds of an answer, read in one batch and by a prompt for each question of the first `alone` prompts."""
    longest = task.answers.shape[2]

    def together(prompts: int) -> np.ndarray:
        asked = np.maximum(task.answers, 0)
        chosen = read_answers(model, task.tokens, task.places, asked, rows=prompts, dtype=jnp.float32)[1]
        return is_answer(np.where(task.answers == NO_TOKEN, NO_TOKEN, chosen), task.answers)

    def one_by_one(prompts: int) -> np.ndarray:
        right = np.zeros((prompts, task.pairs), bool)
        for prompt, question in np.ndindex(*right.shape):
            tokens = task.tokens[prompt, : task.places[prompt, question] + 1].tolist()
            (said,) = generate(model, [tokens], longest)
            answer = task.answers[prompt, question]
            answer = answer[answer != NO_TOKEN].tolist()
            right[prompt, question] = said[: len(answer)] == answer
        return right

    prompts = len(task.tokens)
    (batched, fast), (single, slow) = timed(together, prompts, prompts), timed(one_by_one, alone, 1)
    np.testing.assert_array_equal(batched[:alone], single)
    return fast / batched.size, slow / single.size


def needles(model: Model, given: PromptSet, vocabulary: Vocabulary, alone: int) -> tuple[float, float]:
    """Seconds of an answer, written in one batch and one at a time for the first `alone` prompts."""
    assert given.length is not None

    def write(prompts: int, rows: int) -> list[str]:
        part = replace(given, tokens=given.tokens[:prompts], prompts=given.prompts[:prompts])
        tokens = rows * (given.length or 0)
        return write_answers(model, part, vocabulary, [], batch_tokens=tokens, dtype=jnp.float32)

    prompts = len(given.tokens)
    batched, fast = timed(partial(write, rows=prompts), prompts, prompts)
    single, slow = timed(partial(write, rows=1), alone, 1)
    assert batched[:alone] == single, "answers in batches differ from those alone"
    return fast / prompts, slow / alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", help="a model to use; without one, a small model with random weights")
    parser.add_argument("--prompts", type=int, default=32, help="of each kind, and rows at once")
    parser.add_argument("--alone", type=int, default=2, help="of them that are asked one at a time, too")
    parser.add_argument("--pairs", type=int, default=16, help="of a prompt of the recall probe")
    parser.add_argument("--length", type=int, default=512, help="of a needle's prompt with its answer, in tokens")
    arguments = parser.parse_args()
    files = open_teacher(arguments.teacher or "demo:smollm2-135m")
    vocabulary = load_vocabulary(files.folder, files.config.vocab_size)
    model = load_teacher(arguments.teacher) if arguments.teacher else small_hybrid(files.config.vocab_size)
    task = recall_task(vocabulary, arguments.pairs, prompts=arguments.prompts)
    settings = RulerConfig(tasks=("niah_single_1",), lengths=(arguments.length,), samples=arguments.prompts, chat=False)
    with tempfile.TemporaryDirectory() as folder:
        (given,) = ruler_prompts(settings, Asker(vocabulary, chat=False), Path(folder))
    for name, (fast, slow) in (
        (f"recall of {arguments.pairs} pairs", probe(model, task, arguments.alone)),
        (f"needles, {arguments.length} tokens", needles(model, given, vocabulary, arguments.alone)),
    ):
        print(
            f"{name}: an answer takes {1000 * fast:.2f} ms in a batch of {arguments.prompts} prompts, "
            f"{1000 * slow:.2f} ms alone: {slow / fast:.1f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
