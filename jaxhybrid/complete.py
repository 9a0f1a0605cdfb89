"""Prompts in, text out: tokenizer, chat template and generation together."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxhybrid.data import Vocabulary, load_vocabulary
from jaxhybrid.decoding.engine import Engine, Request, rounded
from jaxhybrid.decoding.generate import seeded
from jaxhybrid.decoding.sampling import Sampling
from jaxhybrid.decoding.text import Answer
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.families.student import is_student
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.huggingface import load_student, load_teacher
from jaxhybrid.weights.safetensors import read_table

SETTINGS = ("generation_config.json", "config.json")
PENALTY = "repetition_penalty"  # built here, for callers that apply it
# What changes transformers' greedy text, unless it is one of NEUTRAL.
NOT_BUILT = (
    PENALTY, "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "guidance_scale", "num_beams",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "exponential_decay_length_penalty",
)  # fmt: skip
NEUTRAL: tuple[Any, ...] = (None, 0, 1, [], {})


def open_model(
    folder: str,
    prepend_bos: bool | None = None,
    mesh: Mesh | None = None,
    *,
    dtype: Any = "float32",
    applied: Sequence[str] = (),
) -> tuple[Model, Vocabulary, list[int]]:
    """An exported hybrid or a teacher, whichever the folder's config says it is; its vocabulary; what ends an answer.

    Warns of settings by which transformers' `generate` would give other greedy text for this folder.

    Args:
        prepend_bos: begin texts with BOS, or never. None: as the tokenizer does by itself.
        mesh: place the model on it. None: on the default device.
        dtype: of the parameters.
        applied: the settings among NOT_BUILT that the caller applies.
    """
    load = load_student if is_student(Path(folder).expanduser()) else load_teacher
    model = load(folder, jnp.dtype(dtype), mesh=mesh)
    vocabulary = load_vocabulary(model.folder, model.config.vocab_size, prepend_bos=prepend_bos)
    settings = _generation_settings(Path(model.folder))
    changing = [key for key in NOT_BUILT if key not in applied and settings.get(key) not in NEUTRAL]
    if changing:
        told = ", ".join(f"{key}={settings[key]!r}" for key in changing)
        warnings.warn(
            f"The generation settings of {model.folder} have {told}, which transformers' `generate` "
            "applies. That is not built here: greedy text is the model's own.",
            stacklevel=2,
        )
    return model, vocabulary, end_ids(Path(model.folder), vocabulary.tokenizer.eos_token_id)


def end_ids(folder: Path, tokenizer_end: int | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, and what the model's generation settings add to it."""
    given = _generation_settings(folder).get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return sorted({end for end in (tokenizer_end, *listed) if end is not None})


def own_penalty(folder: Path) -> float:
    """The repetition penalty that a model's generation settings ask for; 1 is none."""
    return _generation_settings(folder).get(PENALTY) or 1.0


def _generation_settings(folder: Path) -> dict[str, Any]:
    """Those of generation_config.json, or of config.json where there is no such file, as transformers reads them."""
    path = next((path for name in SETTINGS if (path := folder / name).is_file()), None)
    return {} if path is None else read_table(path)


def decoding_mesh(dtype: str, tensor: int) -> Mesh | None:
    """The first `tensor` devices, which share heads, MLPs and the vocabulary; None for one.

    Raises:
        ConfigError: there are not so many devices, or `dtype` is none that is decoded in.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype}: use float32 or bfloat16.")
    if not 1 <= tensor <= len(jax.devices()):
        raise ConfigError(f"tensor={tensor}: there are {len(jax.devices())} devices here.")
    return make_mesh(1, 1, tensor, devices=jax.devices()[:tensor]) if tensor > 1 else None


def complete(
    folder: str,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    dtype: str = "float32",
    tensor: int = 1,
    on_text: Callable[[int, str], None] = lambda number, piece: None,
) -> list[str]:
    """The continuation of each prompt, ended at one of the model's end tokens or before a stop string.

    Args:
        temperature, top_k, top_p, min_p, seed: see `Sampling`; prompt i draws with `seed + i`.
        repetition_penalty: None takes that of the folder's generation settings, as transformers does, or none.
        chat: put each prompt through the chat template, as a user's message.
        dtype: of weights and computation, float32 or bfloat16.
        tensor: devices that share heads, MLPs and the vocabulary.
        on_text: gets (number of the prompt, piece of its answer) as text comes.

    Raises:
        DataError: the chat template is asked for and the tokenizer has none.
        ConfigError: a setting is out of range.
    """
    if "" in stop:
        raise ConfigError("A stop string is empty; every text would end before it begins.")
    mesh = decoding_mesh(dtype, tensor)
    choice = Sampling(temperature, top_k, top_p, min_p, 1.0 if repetition_penalty is None else repetition_penalty, seed)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model, vocabulary, ends = open_model(folder, mesh=mesh, dtype=dtype, applied=[PENALTY])
        if repetition_penalty is None:
            choice = replace(choice, repetition_penalty=own_penalty(Path(model.folder)))
        requests = {
            number: Request(tokens, max_new_tokens, seeded(choice, number), tuple(ends))
            for number, tokens in enumerate(prompt_tokens(vocabulary, prompts, chat))
        }
        if not requests:
            return []
        engine = Engine(model, rounded(len(requests)), dtype=dtype, consume=True)
        engine.prefill(requests)
        answers = {number: Answer(partial(answer_text, vocabulary), stop) for number in requests}
        while engine.busy:
            for number, tokens in engine.step().items():
                answer = answers[number]
                piece = answer.add(tokens)
                if answer.is_stopped:
                    engine.stop(number)
                if number not in engine.busy:
                    piece += answer.rest()
                on_text(number, piece)
    return [answer.text for answer in answers.values()]


def answer_text(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """The text of tokens of an answer, without special ones."""
    return str(vocabulary.tokenizer.decode(tokens, skip_special_tokens=True))


def prompt_tokens(vocabulary: Vocabulary, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Each prompt as the model shall read it.

    Raises:
        DataError: the chat template is asked for and the tokenizer has none.
    """
    if not chat:
        return [vocabulary.prompt(prompt) for prompt in prompts]
    if not vocabulary.tokenizer.chat_template:
        raise DataError(f"The tokenizer of {vocabulary.name} has no chat template; leave --chat out.")
    return [chat_tokens(vocabulary, [{"role": "user", "content": prompt}]) for prompt in prompts]


def chat_tokens(vocabulary: Vocabulary, messages: Sequence[dict[str, str]]) -> list[int]:
    """A conversation as the chat template has it, up to where the model is to answer."""
    text = vocabulary.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return vocabulary.prompt(text, begin=False)
