"""What is refused, by name and before any weight is read: what would be wrong, or is not written."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .exported.configuration_jaxhybrid import JaxHybridConfig
from .pages import LINEAR


class Check(VerifyAndUpdateConfig):
    """Called by vLLM in the process that was started, before it starts others."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check(vllm_config)


def check(vllm_config: VllmConfig) -> None:
    """Raises ValueError with the option to change."""
    config: JaxHybridConfig = vllm_config.model_config.hf_config
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for option, size in (
        ("tensor-parallel-size", parallel.tensor_parallel_size),
        ("pipeline-parallel-size", parallel.pipeline_parallel_size),
    ):
        if size > 1:
            raise ValueError(f"--{option} {size}: this model runs on one device a replica; take 1.")
    if vllm_config.speculative_config is not None:
        raise ValueError("--speculative-config: a recurrent state cannot be rolled back; leave it out.")
    if (quantization := vllm_config.model_config.quantization) is not None:
        raise ValueError(f"--quantization {quantization}: take the weights as they are exported.")
    for option, dtype in (
        ("mamba-cache-dtype", cache.mamba_cache_dtype),
        ("mamba-ssm-cache-dtype", cache.mamba_ssm_cache_dtype),
    ):
        if dtype not in ("auto", "float32"):
            raise ValueError(f"--{option} {dtype}: states are kept in float32; leave it out.")
    if len({*config.layer_types}) < 2:
        raise ValueError(
            f"All layers are {config.layer_types[0]}; a hybrid has both kinds"
            + (", and vLLM's hybrid cache wants a softmax layer." if config.layer_types[0] == LINEAR else ".")
        )
    for name, value in (
        ("experts", config.trait("experts", None)),
        ("attention_cap", config.trait("attention_cap", None)),
        ("logit_cap", config.trait("logit_cap", None)),
        ("softmax.length_scale", config.softmax.get("length_scale")),
    ):
        if value is not None:
            raise ValueError(f"{name} {value}: not written for vLLM; load this folder in transformers.")
    _check_rotation(config, vllm_config.model_config.max_model_len)


def _check_rotation(config: JaxHybridConfig, longest: int) -> None:
    """Rules that turn by a text's whole length are one rule up to some length; beyond it sequences would mix."""
    for rope in (config.rope_parameters, (config.trait("window", None) or {}).get("rope")):
        if rope is None or rope["rope_type"] not in ("dynamic", "longrope"):
            continue
        is_long = rope["rope_type"] == "longrope"
        length = rope["original_max_position_embeddings"] if is_long else config.max_position_embeddings
        if longest > length:
            raise ValueError(
                f"rope_type {rope['rope_type']!r} turns by a text's length beyond {length} tokens, which is not "
                f"written: --max-model-len {length} instead of {longest}."
            )
