"""Prompts in, text out: tokenizer, chat template and generation together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxhybrid.data import load_vocabulary
from jaxhybrid.errors import DataError
from jaxhybrid.export.folder import is_export
from jaxhybrid.generate import generate
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.files import read_table
from jaxhybrid.weights.huggingface import load_student, load_teacher


def open_model(folder: str) -> tuple[Model, Any, list[int]]:
    """An exported hybrid or a teacher, whichever the folder's config says it is; its tokenizer; what ends an answer."""
    model = load_student(folder) if is_export(Path(folder).expanduser()) else load_teacher(folder)
    vocabulary = load_vocabulary(model.folder, model.config.vocab_size)
    return model, vocabulary.tokenizer, end_ids(Path(model.folder), vocabulary.end_id)


def end_ids(folder: Path, tokenizer_end: int) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and what the model's generation config adds to it."""
    path = folder / "generation_config.json"
    given = read_table(path).get("eos_token_id") if path.is_file() else None
    listed = [] if given is None else given if isinstance(given, list) else [given]
    return sorted({tokenizer_end, *listed})


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
    model, tokenizer, ends = open_model(folder)
    if chat:
        if not tokenizer.chat_template:
            raise DataError(f"The tokenizer of {model.folder} has no chat template; leave --chat out.")
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
    tokens = [tokenizer(prompt, add_special_tokens=not chat)["input_ids"] for prompt in prompts]
    answers = generate(model, tokens, max_new_tokens, eos_ids=ends, temperature=temperature, seed=seed)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
