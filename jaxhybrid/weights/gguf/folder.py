"""A GGUF model as a Hugging Face folder in the user's cache, made once for each content.

Weights are widened to float32: a quantised value is a small integer times one float16, often plus another, which
bfloat16 would round.
"""

import os
import re
from pathlib import Path
from typing import Any

from jaxhybrid.errors import JaxHybridError
from jaxhybrid.files import draft_of, make_folder, read_json, remove, storage_errors, write_json, write_text
from jaxhybrid.weights.gguf.config import hugging_face_config, token_id
from jaxhybrid.weights.gguf.model import GgufModel, open_gguf
from jaxhybrid.weights.gguf.tensors import write_weights
from jaxhybrid.weights.gguf.tokenizer import rebuild_tokenizer
from jaxhybrid.weights.safetensors import SINGLE_FILE

LAYOUT_VERSION = 1  # raise when the folder's content changes
ORIGIN = "gguf.json"  # where the folder is from and how large its files are, to know it again
WAY_OUT = "set XDG_CACHE_HOME to another folder"
END_TOKENS = ("eot", "eom")  # of a turn and of a message: a chat model ends its answers with them


def gguf_folder(name: str) -> Path:
    """The Hugging Face folder of a GGUF model, written on first use to `$XDG_CACHE_HOME/jaxhybrid`.

    Args:
        name: a file, the first file of llama.cpp's split, or a pattern that matches plain parts.

    Raises:
        WeightsError: the model is not whole, or has something that is not known.
        RunError: the cache cannot be written.
    """
    model = open_gguf(name)
    digest = model.digest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxhybrid"
    folder = cache / f"{_label(model)}-{digest[:16]}-{LAYOUT_VERSION}"
    if _whole(folder):
        return folder
    make_folder(cache, WAY_OUT)
    with storage_errors(folder, WAY_OUT), draft_of(folder) as draft:
        draft.mkdir()
        write_folder(model, draft)
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        files = [str(file.absolute()) for file in model.files]
        write_json(draft / ORIGIN, {"files": files, "sha256": digest, "sizes": sizes}, WAY_OUT)
        try:
            draft.rename(folder)
        except OSError:  # there is one: a damaged one, or another process's, which is read already
            if not _whole(folder):
                remove(folder)
                draft.rename(folder)
    return folder


def write_folder(model: GgufModel, folder: Path) -> None:
    """Writes config, tokenizer and weights. What cannot be represented is refused before the weights are read."""
    config = hugging_face_config(model)
    write_json(folder / "config.json", config, WAY_OUT)
    write_json(folder / "generation_config.json", _generation_config(model, config), WAY_OUT)
    tokenizer, settings = rebuild_tokenizer(model, config["max_position_embeddings"])
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True), WAY_OUT)
    write_json(folder / "tokenizer_config.json", settings, WAY_OUT)
    write_weights(model, config, folder / SINGLE_FILE)


def _generation_config(model: GgufModel, config: dict[str, Any]) -> dict[str, Any]:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    ends = [ids.get("eos_token_id"), *(token_id(model, name) for name in END_TOKENS)]
    distinct = list(dict.fromkeys(end for end in ends if end is not None))
    return ids | ({"eos_token_id": distinct} if len(distinct) > 1 else {})


def _label(model: GgufModel) -> str:
    """The model's own name, as far as it can be part of a folder's."""
    name = model.metadata.get("general.name")
    return re.sub(r"[^A-Za-z0-9.]+", "-", name if isinstance(name, str) else "")[:60].strip("-.") or "gguf"


def _whole(folder: Path) -> bool:
    """Whether the folder has every file it was written with, each as large as it was."""
    try:
        sizes = read_json(folder / ORIGIN)["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, JaxHybridError, KeyError, TypeError, AttributeError):
        return False
