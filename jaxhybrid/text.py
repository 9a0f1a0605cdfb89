"""Prompts in, text out: tokenizer, chat template and generation together."""

from collections.abc import Sequence
from pathlib import Path

from jaxhybrid.data import Vocabulary, load_vocabulary
from jaxhybrid.errors import DataError
from jaxhybrid.export.folder import is_export
from jaxhybrid.generate import generate
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.files import read_table
from jaxhybrid.weights.huggingface import load_student, load_teacher

SETTINGS = ("generation_config.json", "config.json")


def open_model(folder: str, prepend_bos: bool | None = None) -> tuple[Model, Vocabulary, list[int]]:
    """An exported hybrid or a teacher, whichever the folder's config says it is; its vocabulary; what ends an answer.

    prepend_bos: begin texts with BOS, or never; None: as the tokenizer does by itself.
    """
    model = load_student(folder) if is_export(Path(folder).expanduser()) else load_teacher(folder)
    vocabulary = load_vocabulary(model.folder, model.config.vocab_size, prepend_bos=prepend_bos)
    return model, vocabulary, end_ids(Path(model.folder), vocabulary.tokenizer.eos_token_id)


def end_ids(folder: Path, tokenizer_end: int | None) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, and what the model's settings add to it.

    Those are in generation_config.json, or in config.json where there is no such file, as transformers reads them.
    """
    path = next((path for name in SETTINGS if (path := folder / name).is_file()), None)
    given = None if path is None else read_table(path).get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return sorted({end for end in (tokenizer_end, *listed) if end is not None})


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
