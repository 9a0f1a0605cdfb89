"""A student written as a Hugging Face folder: weights, config, tokenizer, and its model code for transformers."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from jaxhybrid import hosts
from jaxhybrid.checksums import MANIFEST, write_manifest
from jaxhybrid.errors import ConfigError, RunError
from jaxhybrid.export.card import base_model_name, model_card
from jaxhybrid.export.form import choose
from jaxhybrid.families import native_student_config_to_hf, student_config_to_hf
from jaxhybrid.families.student import is_student
from jaxhybrid.files import draft_of, make_folder, storage_errors, write_json
from jaxhybrid.model.config import LinearConfig, ModelConfig
from jaxhybrid.model.transformer import Model
from jaxhybrid.weights.huggingface import TERMS_FILES
from jaxhybrid.weights.safetensors import read_table
from jaxhybrid.weights.save import save_weights

REMOTE_CODE = Path(__file__).parent / "remote_code"
CODE_FILES = tuple(sorted(path.name for path in REMOTE_CODE.glob("*_jaxhybrid.py")))
AUTO_MAP = {
    "AutoConfig": "configuration_jaxhybrid.JaxHybridConfig",
    "AutoModel": "modeling_jaxhybrid.JaxHybridModel",
    "AutoModelForCausalLM": "modeling_jaxhybrid.JaxHybridForCausalLM",
}
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes a tokenizer
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
WRITTEN = (*CODE_FILES, *TOKENIZER_FILES, *TERMS_FILES, "config.json", "generation_config.json", "README.md", MANIFEST)
WRITTEN_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
WAY_OUT = "choose another folder; nothing is left of the export: run it again"


def export(
    model: Model,
    folder: str | os.PathLike[str],
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    *,
    format: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    told: Callable[[str], None] = lambda text: None,
    made: str = "",
) -> Path:
    """Writes `model` to `folder`: safetensors, config, generation config, tokenizer, model code, model card, checksums.

    The folder appears whole or not at all. Tokenizer, generation config and the terms of the base model come from
    `model.folder`. With several processes all must call it, and the first one writes.
    It loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` without jaxhybrid or jax; in
    the native form, an architecture that transformers has itself, without `trust_remote_code`.

    Args:
        dtype: of the weights; decays (`A_log`, `dt_bias`) stay float32.
        format: `native`, `remote-code`, or `auto`: native where that is exact.
        max_shard_bytes: weights files are split at this size.
        overwrite: replace `folder` whatever it holds. Without it, only an earlier export is replaced.
        told: gets what form was chosen, and why not another.
        made: Markdown for the model card: how the model was trained, and its figures.

    Raises:
        ConfigError: `dtype` or `format` is unknown, or the model has a shape that its family, or a native architecture
            that was asked for, cannot express.
        RunError: `folder` holds something else, or cannot be written.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"export dtype {dtype!r}: choose bfloat16 or float32.")
    mixer = model.config.mixer
    if mixer is not None and f"{mixer.kind}_jaxhybrid.py" not in CODE_FILES:
        raise ConfigError(f"{mixer.kind} has no PyTorch layer in {REMOTE_CODE}; an export of it could not be loaded.")
    if isinstance(mixer, LinearConfig) and None in (mixer.qkv_bias, mixer.qk_norm):
        raise ConfigError("The mixer's qkv_bias or qk_norm is unset; export a student that `convert` made.")
    target = Path(folder).expanduser().absolute()
    source = Path(model.folder) if model.folder else None
    hosts.by_first(lambda: refuse_to_replace(target, source, overwrite), "refuse to replace")

    source_config = _table(source, "config.json")
    base = base_model_name(source, source_config)
    config = student_config_to_hf(model.config, source_config)  # refuses what the family cannot say
    form = choose(model, dtype, format)
    if form.told:
        told(form.told)
    if form.native:
        config = native_student_config_to_hf(model.config, source_config, form.native)
    else:
        config |= {"architectures": ["JaxHybridForCausalLM"], "auto_map": AUTO_MAP}
    config |= {"dtype": dtype, "base_model": base}
    generation_config = _generation_config(model.config, source, source_config)
    writer = hosts.is_first()
    make_folder(target.parent, WAY_OUT)
    with storage_errors(target, WAY_OUT), draft_of(target) as draft:
        draft.mkdir()
        if writer:
            write_json(draft / "config.json", config, WAY_OUT)
            write_json(draft / "generation_config.json", generation_config, WAY_OUT)
            for name in () if form.native else CODE_FILES:
                shutil.copyfile(REMOTE_CODE / name, draft / name)
            _copy_tokenizer(source, draft)
            terms = sorted(path.name for pattern in TERMS_FILES for path in draft.glob(pattern))
            card = model_card(model.config, target.name, base, dtype, native=form.native, made=made, terms=terms)
            (draft / "README.md").write_text(card)
        save_weights(
            model.params, model.config, draft, jnp.dtype(dtype), max_shard_bytes,
            tensors=form.tensors, factors=form.factors,
        )  # fmt: skip
        if writer:
            write_manifest(draft)
            _put_in_place(draft, target)
    hosts.barrier(f"export {target}")
    return target


def refuse_to_replace(target: Path, source: Path | None, overwrite: bool) -> None:
    """Raises RunError when writing `target` would lose something that is not an earlier export's own."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RunError(f"{target} is a file; name a folder to export to.")
    if source is not None and source.absolute() != target and target.resolve() in source.resolve().parents:
        raise RunError(f"{target} contains the base model's folder {source}; export to another place.")
    entries = sorted(target.iterdir())
    if overwrite or not entries:
        return
    if not is_student(target):
        raise RunError(
            f"{target} holds something that is not an earlier export; "
            "name a new folder (export.folder), or pass overwrite=True (export --overwrite)."
        )
    foreign = [e.name for e in entries if not any(e.match(pattern) for pattern in (*WRITTEN, *WRITTEN_WEIGHTS))]
    if foreign:
        raise RunError(
            f"{target} is an earlier export with other files in it, which would be lost: {', '.join(foreign[:5])}. "
            "Name a new folder (export.folder), or pass overwrite=True (export --overwrite)."
        )


def _table(source: Path | None, name: str) -> dict[str, Any]:
    """A JSON table of the base model; empty where there is none."""
    return read_table(source / name) if source is not None and (source / name).is_file() else {}


def _generation_config(config: ModelConfig, source: Path | None, source_config: dict[str, Any]) -> dict[str, Any]:
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # what `generate` needs to know where a text ends
    generation = _table(source, "generation_config.json") or {
        name: source_config[name] for name in ids if source_config.get(name) is not None
    }
    if (generation.get("pad_token_id") or 0) >= config.vocab_size:  # `generate` would look up a row that is not there
        del generation["pad_token_id"]
    return generation


def _copy_tokenizer(source: Path | None, draft: Path) -> None:
    present = [] if source is None else [name for name in TOKENIZER_FILES if (source / name).exists()]
    if not set(present) & set(VOCABULARY_FILES):
        warnings.warn(
            f"No tokenizer in {source or 'the model: it has no source folder'}; looked for "
            f"{', '.join(VOCABULARY_FILES)}. The export has weights and code only; add a tokenizer's files.",
            stacklevel=3,
        )
    if source is None:
        return
    terms = [path.name for pattern in TERMS_FILES for path in source.glob(pattern) if path.is_file()]
    for name in (*present, *terms):  # the terms of the base model hold for weights made from it
        if (source / name).is_dir():
            shutil.copytree(source / name, draft / name)
        else:
            shutil.copyfile(source / name, draft / name)


def _put_in_place(draft: Path, target: Path) -> None:
    """Renames `draft` to `target`; an earlier folder is removed only once the new one stands."""
    if not target.exists():
        draft.rename(target)
        return
    earlier = draft.with_suffix(".old")
    target.rename(earlier)
    try:
        draft.rename(target)
    except OSError:
        earlier.rename(target)
        raise
    shutil.rmtree(earlier)
