"""Key-value recall: read a list of names and numbers, then say each name's number again.

What a linear layer's fixed-size state is worst at and softmax layers are kept for. Synthetic text, any tokenizer, no
download. An answer is right when greedy decoding would give exactly its tokens.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxhybrid.evaluate.answers import read_answers
from jaxhybrid.evaluate.bootstrap import Share
from jaxhybrid.evaluate.recall_figures import chance, recall_figures
from jaxhybrid.evaluate.recall_prompts import RecallTask
from jaxhybrid.model.transformer import Model

LEAST_TEACHER = 0.8  # right answers; a teacher with fewer does not do the task, which then says nothing of its students
Greedy = Callable[[np.ndarray, np.ndarray], np.ndarray]  # tokens [P,T], n prompts -> the model's tokens [n,Q,A]


def compare_recall(
    models: dict[str, Model], tasks: Sequence[RecallTask], *, batch_tokens: int, dtype: Any = jnp.bfloat16
) -> list[dict[str, Any]]:
    """For each task what it is, what chance gives, and the figures of the models, by name, the teacher first.

    Where the teacher has fewer than LEAST_TEACHER of its answers right, `applies` is false and no student is measured.
    """
    results = []
    for task in tasks:
        record: dict[str, Any] = {
            "pairs": task.pairs,
            "filler_tokens": task.filler_tokens,
            "prompts": len(task.tokens),
            "prompt_tokens": round(float(task.lengths.mean()), 1),
            "chance": chance(task),
            "applies": True,
            "models": {},
        }
        for name, model in models.items():
            if record["applies"]:
                record["models"][name] = recall(model, task, batch_tokens=batch_tokens, dtype=dtype)
                record["applies"] = record["models"]["teacher"]["right"]["share"] >= LEAST_TEACHER
        results.append(record)
    return results


def recall(model: Model, task: RecallTask, *, batch_tokens: int, dtype: Any = jnp.bfloat16) -> dict[str, Share]:
    """The figures of one model, as `recall_figures` gives them. The model lies on the active mesh.

    Prompts run in batches of about `batch_tokens` tokens, at least one prompt a device; one program for all of them.
    """
    batches = -(-len(task.tokens) // max(batch_tokens // task.tokens.shape[1], 1))
    rows = -(-len(task.tokens) // batches)

    def greedy(tokens: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        asked = np.maximum(task.answers[prompts], 0)  # after a short one's end, too: a wrong one may go on there
        return read_answers(model, tokens[prompts], task.places[prompts], asked, rows=rows, dtype=dtype)[1]

    chosen = greedy(task.tokens, np.arange(len(task.tokens)))
    return recall_figures(task, chosen, says_another_name(task, chosen, greedy))


def says_another_name(task: RecallTask, chosen: np.ndarray, greedy: Greedy) -> np.ndarray:
    """[P]: whether a wrong answer of the prompt, drawn by its seed, is the number of another name of that prompt.

    `chosen` has what follows the *right* beginning of each answer. What the model says after a wrong token of its own
    is found by putting that token into the prompt, as long as the answer may still become another name's.
    """
    prompts, length = len(chosen), chosen.shape[2]
    wrong = (chosen != task.answers) & (task.answers >= 0)
    missed = wrong.any(-1)
    rng = random.Random(0)
    drawn = np.argmax(missed * np.array([[rng.random() for _ in row] for row in missed]), 1)
    tokens, result = task.tokens.copy(), np.zeros(prompts, bool)
    said: dict[int, list[int]] = {}  # tokens of the followed answer of a prompt
    for prompt in np.flatnonzero(missed.any(1)).tolist():
        own = chosen[prompt, drawn[prompt]]
        said[prompt] = [int(token) for token in own[: np.argmax(wrong[prompt, drawn[prompt]]) + 1]]
    while said:
        for prompt, words in list(said.items()):
            others = np.delete(task.answers[prompt], drawn[prompt], 0)
            alike = others[(others[:, : len(words)] == words).all(1)]
            ended = len(words) == length
            result[prompt] = any(ended or other[len(words)] < 0 for other in alike)
            if result[prompt] or not len(alike):
                del said[prompt]
        if said:
            going = np.array(list(said))
            for prompt, words in said.items():
                begin = task.places[prompt, drawn[prompt]] + 1
                tokens[prompt, begin : begin + len(words)] = words
            more = greedy(tokens, going)
            for row, prompt in enumerate(going.tolist()):
                said[prompt].append(int(more[row, drawn[prompt], len(said[prompt])]))
    return result
