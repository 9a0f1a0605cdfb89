"""Mixtures of experts in every layer: Mixtral, which is Mistral otherwise, and Qwen3-MoE, which is Qwen3."""

from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.families.base import Family, all_full, one_kind, read_flag, read_integer, window_key
from jaxhybrid.model.config import ExpertsConfig, ModelConfig

# Read by nobody: what adds to the loss or the noise of transformers' own training of these models.
TRAINING_KEYS = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")


def _mixtral_flags(hf: dict[str, Any]) -> dict[str, Any]:
    count, width = read_integer(hf, "num_local_experts"), read_integer(hf, "intermediate_size")
    return {"experts": ExpertsConfig(count, read_integer(hf, "num_experts_per_tok"), width, normalise=True)}


def _mixtral_keys(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    own = {} if experts is None else {"num_local_experts": experts.count, "num_experts_per_tok": experts.active}
    return own | window_key(config)


def _qwen3_flags(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse_dense_layers(hf)
    counts = {name: read_integer(hf, name) for name in ("num_experts", "num_local_experts") if name in hf}
    if len({*counts.values()}) > 1:
        raise ConfigError(f"num_experts={hf['num_experts']}, but num_local_experts={hf['num_local_experts']}.")
    experts = ExpertsConfig(
        count=next(iter(counts.values()), 128),
        active=read_integer(hf, "num_experts_per_tok"),
        width=read_integer(hf, "moe_intermediate_size"),
        normalise=read_flag(hf, "norm_topk_prob"),
    )
    bias = read_flag(hf, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "experts": experts}


def _refuse_dense_layers(hf: dict[str, Any]) -> None:
    step, named = read_integer(hf, "decoder_sparse_step"), hf.get("mlp_only_layers") or ()
    layers = range(read_integer(hf, "num_hidden_layers"))
    dense = [layer for layer in layers if layer in named or (layer + 1) % step]
    if dense:
        raise ConfigError(
            f"decoder_sparse_step={step} and mlp_only_layers={list(named)} give the layers "
            f"{', '.join(map(str, dense))} a dense MLP; the blocks of a model are one stack here, so that either all "
            "layers have experts or none has."
        )


def _qwen3_keys(config: ModelConfig) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if (experts := config.experts) is not None:
        own = {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.active,
            "moe_intermediate_size": experts.width,
            "norm_topk_prob": experts.normalise,
        }
    slides = {"use_sliding_window": config.window is not None, **window_key(config)}
    return {"attention_bias": config.qkv_bias, **own, **slides}


def _qwen3_kinds(hf: dict[str, Any]) -> list[str]:
    """All layers slide, or none: transformers reads no `max_window_layers` here."""
    return one_kind(hf) if read_flag(hf, "use_sliding_window") else all_full(hf)


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    flags=_mixtral_flags,
    flag_keys=_mixtral_keys,
    own_keys=("num_local_experts", "num_experts_per_tok", "sliding_window", *TRAINING_KEYS),
    defaults={
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    fused={
        "block_sparse_moe.gate": ("mlp.gate",),
        "block_sparse_moe.experts.{expert}.w1": ("mlp.experts.{expert}.gate_proj",),
        "block_sparse_moe.experts.{expert}.w2": ("mlp.experts.{expert}.down_proj",),
        "block_sparse_moe.experts.{expert}.w3": ("mlp.experts.{expert}.up_proj",),
    },
    kinds=one_kind,
)  # fmt: skip
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    flags=_qwen3_flags,
    flag_keys=_qwen3_keys,
    own_keys=(
        *("attention_bias", "decoder_sparse_step", "mlp_only_layers", "num_experts", "num_local_experts"),
        *("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("use_sliding_window", "sliding_window", "max_window_layers", *TRAINING_KEYS),
    ),
    defaults={
        "max_position_embeddings": 32768, "sliding_window": 4096, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "decoder_sparse_step": 1,
    },
    kinds=_qwen3_kinds,
)  # fmt: skip
