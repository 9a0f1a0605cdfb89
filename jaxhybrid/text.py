"""Prompts in, text out: tokenizer, chat template and generation together."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxhybrid.data import Vocabulary, load_vocabulary
from jaxhybrid.errors import DataError
from jaxhybrid.export.folder import is_export
from jaxhybrid.generate import generate
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.files import read_table
from jaxhybrid.weights.huggingface import load_student, load_teacher

SETTINGS = ("generation_config.json", "config.json")
# What changes transformers' greedy text, unless it is one of NEUTRAL.
NOT_BUILT = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "guidance_scale", "num_beams",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "exponential_decay_length_penalty",
)  # fmt: skip
NEUTRAL: tuple[Any, ...] = (None, 0, 1, [], {})


def open_model(
    folder: str, prepend_bos: bool | None = None, mesh: Mesh | None = None
) -> tuple[Model, Vocabulary, list[int]]:
    """An exported hybrid or a teacher, whichever the folder's config says it is; its vocabulary; what ends an answer.

    Warns of settings by which transformers' `generate` would give other greedy text for this folder.

    Args:
        prepend_bos: begin texts with BOS, or never. None: as the tokenizer does by itself.
        mesh: place the model on it. None: on the default device.
    """
    load = load_student if is_export(Path(folder).expanduser()) else load_teacher
    model = load(folder, mesh=mesh)
    vocabulary = load_vocabulary(model.folder, model.config.vocab_size, prepend_bos=prepend_bos)
    settings = _generation_settings(Path(model.folder))
    told = [f"{key}={settings[key]!r}" for key in NOT_BUILT if settings.get(key) not in NEUTRAL]
    if told:
        warnings.warn(
            f"The generation settings of {model.folder} have {', '.join(told)}, which transformers' `generate` "
            "applies. That is not built here: greedy text is the model's own.",
            stacklevel=2,
        )
    return model, vocabulary, end_ids(Path(model.folder), vocabulary.tokenizer.eos_token_id)


def end_ids(folder: Path, tokenizer_end: int | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, and what the model's generation settings add to it."""
    given = _generation_settings(folder).get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return sorted({end for end in (tokenizer_end, *listed) if end is not None})


def _generation_settings(folder: Path) -> dict[str, Any]:
    """Those of generation_config.json, or of config.json where there is no such file, as transformers reads them."""
    path = next((path for name in SETTINGS if (path := folder / name).is_file()), None)
    return {} if path is None else read_table(path)


def complete(
    folder: str,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[str]:
    """The continuation of each prompt, ended at one of the model's end tokens.

    Raises:
        DataError: the chat template is asked for and the tokenizer has none.
    """
    model, vocabulary, ends = open_model(folder)
    tokenizer = vocabulary.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise DataError(f"The tokenizer of {model.folder} has no chat template; leave --chat out.")
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
    tokens = [vocabulary.prompt(prompt, begin=not chat) for prompt in prompts]
    answers = generate(model, tokens, max_new_tokens, eos_ids=ends, temperature=temperature, seed=seed)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
