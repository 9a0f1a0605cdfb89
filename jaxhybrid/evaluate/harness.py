"""A model of this package under lm-evaluation-harness: its tasks, scored by JAX on one device or a mesh.

Needs the `eval` extra. Tasks of the harness fetch their data from the hub; a folder of one's own task files needs no
network.
"""

from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.decoding.generate import generate
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate.answers import NO_TOKEN, is_answer, read_answers
from jaxhybrid.model.transformer import Model

BOOTSTRAPS = 1000  # resamples behind a perplexity's standard error; the harness's own 100,000 take minutes
SHORTEST = 64, 8  # row and continuation lengths are powers of two from here on: few shapes, few compilations

TokenRequest = tuple[Any, list[int], list[int]]  # (texts, tokens of the context, tokens of the continuation)


def run_tasks(
    model: Model,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    tasks: Sequence[str],
    *,
    task_folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    cut: bool = True,
) -> dict[str, dict[str, float]]:
    """Figures of each task, `{task: {"acc": 0.31, "acc_stderr": 0.02, ...}}`.

    Args:
        model: on the active mesh, or without one on a single device.
        task_folder: YAML files of further tasks.
        shots: solved examples before each question; None as the task says.
        limit: questions of each task; None takes all.
        batch_size: questions at once, rounded up to a multiple of the devices.
        cut: see `HarnessModel`.

    Raises:
        ConfigError: a task or the dtype is not known, or a number is out of range.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r}: choose float32 or bfloat16.")
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} {value}: at least {least}.")
    manager = find_tasks(tasks, task_folder)
    evaluated = lm_eval.simple_evaluate(
        model=HarnessModel(model, vocabulary, end_ids, batch_size=batch_size, dtype=jnp.dtype(dtype), cut=cut),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
    )
    assert evaluated is not None  # None on other ranks than the first, and there is one
    return {task: _figures(result) for task, result in evaluated["results"].items()}


def find_tasks(tasks: Sequence[str], task_folder: Path | None = None) -> TaskManager:
    """What the harness reads these tasks with. Raises ConfigError where it does not know one."""
    manager, unknown = TaskManager(include_defaults=False), list(tasks)
    for defaults in (False, True):  # reading the harness's own thousands of tasks takes seconds
        if unknown and (task_folder is not None or defaults):
            manager = TaskManager(include_path=task_folder, include_defaults=defaults)
            unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(
            f"lm-eval does not know the task {unknown[0]!r}. `lm-eval ls tasks` lists what it knows; a folder with "
            "task files of your own goes in --task-folder, in a run in evaluate.lm_eval.task_folder."
        )
    return manager


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """{"acc,none": x, "alias": name} -> {"acc": x}; a filter other than `none` stays in the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in result.items()
        if "," in name and isinstance(value, int | float)
    }


class HarnessModel(TemplateLM):
    """What the harness asks of a model: likelihood of a continuation, likelihood of a text, greedy text.

    Tokens are those of the harness's own model for transformers, so that figures compare: texts begin as the vocabulary
    begins them, and `loglikelihood_rolling` scores that beginning as a part of the text. Only what a tokenizer puts
    after a text by itself is left out, for it would end prompts. With `cut`, contexts that are too long lose their
    beginning, as they do there; without, they are an error.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        end_ids: Sequence[int],
        *,
        batch_size: int = 8,
        dtype: Any = jnp.float32,
        cut: bool = True,
    ):
        super().__init__()
        self.cut = cut
        self.model, self.vocabulary, self.batch_size, self.dtype = model, vocabulary, batch_size, dtype
        self.tokenizer = vocabulary.tokenizer
        self.end_ids = list(end_ids)
        self.max_length = model.config.max_position_embeddings

    # --- the names by which the harness asks

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer.eos_token_id
        return self.vocabulary.end_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.folder)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.vocabulary.prompt(string, begin=add_special_tokens is not False)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop sequence. Tokens after one are computed and cut off."""
        answers: list[str] = [""] * len(requests)
        end = self.tokenizer.decode([self.eot_token_id])
        settings = [normalize_gen_kwargs(request.args[1], default_max_gen_toks=256) for request in requests]
        by_length: dict[int, list[int]] = {}
        for number, wanted in enumerate(settings):
            if temperature := wanted.get("temperature"):  # absent, or 0 without sampling
                raise ConfigError(f"A task asks for temperature {temperature}; only greedy text is built.")
            by_length.setdefault(wanted["max_gen_toks"], []).append(number)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for new_tokens, numbers in by_length.items():
                room = self.max_length - new_tokens
                if room < 1:
                    raise ConfigError(f"A task asks for {new_tokens} new tokens; the context has {self.max_length}.")
                for group in batched(numbers, self.batch_size):
                    prompts = [self._kept(self.tok_encode(requests[number].args[0]), room) for number in group]
                    prompts += prompts[-1:] * (self.batch_size - len(group))
                    produced = generate(self.model, prompts, new_tokens, eos_ids=self.end_ids, dtype=self.dtype)
                    for number, tokens in zip(group, produced):
                        stops = handle_stop_sequences(settings[number]["until"], eos=end)
                        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                        answers[number] = postprocess_generated_text(text, stops, None)
                        bar.update()
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of each request.

        Raises:
            DataError: a continuation is empty or longer than the context.
        """
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))  # the largest shapes first
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for group in tqdm(list(batched(order, self.batch_size)), "scoring", disable=disable_tqdm):
            likelihood, greedy = self._score([rows[number] for number in group])
            for number, value, same in zip(group, likelihood, greedy):
                answers[number] = float(value), bool(same)
        return answers

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """(tokens, how many of them at the end are the continuation), the context cut on the left to fit."""
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"A task has a continuation of {len(continuation)} tokens; the model's context is {self.max_length}."
            )
        return self._kept([*context, *continuation], self.max_length + 1), len(continuation)

    def _kept(self, tokens: list[int], room: int) -> list[int]:
        """The last `room` of them."""
        if len(tokens) > room and not self.cut:
            raise DataError(
                f"A task asks about a text of {len(tokens)} tokens, and the model's context has room for {room}: it "
                "would lose its beginning. Leave the task out, or run it with `jaxhybrid benchmark`, which cuts."
            )
        return tokens[-room:]

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
        longest = _power_of_two(max(len(tokens) for tokens, _ in rows) - 1, SHORTEST[0])
        answer = _power_of_two(max(count for _, count in rows), SHORTEST[1])
        tokens = np.zeros((len(rows), longest), np.int32)
        places = np.zeros((len(rows), 1), np.int32)
        answers = np.full((len(rows), 1, answer), NO_TOKEN, np.int32)
        for row, (text, count) in enumerate(rows):
            tokens[row, : len(text) - 1] = text[:-1]
            places[row] = len(text) - 1 - count
            answers[row, 0, :count] = text[-count:]
        likelihood, greedy = read_answers(self.model, tokens, places, answers, rows=self.batch_size, dtype=self.dtype)
        return likelihood[:, 0], is_answer(greedy, answers)[:, 0]


def _power_of_two(length: int, shortest: int) -> int:
    return max(shortest, 1 << (length - 1).bit_length())
