"""Pretrained softmax transformers into hybrid linear-attention models, Hugging Face weights in and out.

The Python API in one place; each name is imported when it is first used, so that `import jaxhybrid` is quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_teacher": "jaxhybrid.weights.huggingface",
    "load_student": "jaxhybrid.weights.huggingface",
    "convert": "jaxhybrid.weights.convert",
    "GatedDeltaNetConfig": "jaxhybrid.model.mixers.gated_deltanet",
    "GLAConfig": "jaxhybrid.model.mixers.gla",
    "DeltaNetConfig": "jaxhybrid.model.mixers.deltanet",
    "KimiDeltaConfig": "jaxhybrid.model.mixers.kimi_delta",
    "FixedDecayConfig": "jaxhybrid.model.mixers.fixed_decay",
    "Mamba2Config": "jaxhybrid.model.mixers.mamba2",
    "RWKV6Config": "jaxhybrid.model.mixers.rwkv6",
    "RWKV7Config": "jaxhybrid.model.mixers.rwkv7",
    "WindowAttentionConfig": "jaxhybrid.model.mixers.window_attention",
    "ModelConfig": "jaxhybrid.model.config",
    "SoftmaxConfig": "jaxhybrid.model.config",
    "Model": "jaxhybrid.model.transformer",
    "forward": "jaxhybrid.model.transformer",
    "generate": "jaxhybrid.decoding.generate",
    "Engine": "jaxhybrid.decoding.engine",
    "Request": "jaxhybrid.decoding.engine",
    "Sampling": "jaxhybrid.decoding.sampling",
    "make_mesh": "jaxhybrid.model.partition",
    "place_batch": "jaxhybrid.train.placement",
    "AlignConfig": "jaxhybrid.settings.stages",
    "ScoreConfig": "jaxhybrid.settings.stages",
    "DistillConfig": "jaxhybrid.settings.stages",
    "FinetuneConfig": "jaxhybrid.settings.stages",
    "align_step": "jaxhybrid.stages.align",
    "linear_mixers": "jaxhybrid.stages.align",
    "score_step": "jaxhybrid.stages.score",
    "candidate_params": "jaxhybrid.stages.score",
    "distill_step": "jaxhybrid.stages.distill",
    "finetune_step": "jaxhybrid.stages.finetune",
    "make_optimizer": "jaxhybrid.train.optimizer",
    "start": "jaxhybrid.train.optimizer",
    "select_layers": "jaxhybrid.selection.methods",
    "layer_types": "jaxhybrid.selection.methods",
    "Pipeline": "jaxhybrid.pipeline",
    "load_config": "jaxhybrid.settings.read",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxhybrid' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
