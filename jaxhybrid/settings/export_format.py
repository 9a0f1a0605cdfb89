"""The forms that an export is written in, and those that people ask for and that are not."""

from typing import Literal, get_args

from jaxhybrid.errors import ConfigError

ExportFormat = Literal["auto", "native", "remote-code"]
FORMATS: tuple[str, ...] = get_args(ExportFormat)
NOT_WRITTEN = {
    "fla": "Models of flash-linear-attention load with its package alone and on a GPU, in no server; their softmax "
    "layers want flash-attn and have neither query and key norms nor scaled rotary embeddings (Qwen3, Llama 3). "
    "Take native: plain transformers and servers load it; or remote-code: transformers with trust_remote_code, on a "
    "CPU, too, and vLLM with plugins/vllm.",
    "gguf": "llama.cpp makes such a file itself, from a native export alone: take native, then run its "
    "convert_hf_to_gguf.py on the folder. For a student that no native form expresses there is no GGUF; take "
    "remote-code: transformers loads it with trust_remote_code, and vLLM with plugins/vllm.",
}
SEE = "`jaxhybrid check FOLDER` says which server loads an export; docs/serving.md has the table."


def check_format(asked: str) -> str:
    """`asked`, if exports are written in it.

    Raises:
        ConfigError: they are not; for forms that others have it says why, and what to take instead.
    """
    if asked in NOT_WRITTEN:
        raise ConfigError(f"export format {asked!r} is not written. {NOT_WRITTEN[asked]} {SEE}")
    if asked not in FORMATS:
        raise ConfigError(f"export format {asked!r}: choose {', '.join(FORMATS)}.")
    return asked
