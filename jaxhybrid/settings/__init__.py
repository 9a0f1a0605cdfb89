"""The settings of a run: what there is, what it means, and reading it from YAML."""

from jaxhybrid.settings.budget import layers_in_budget
from jaxhybrid.settings.compare import UPSTREAM, differences, fingerprint
from jaxhybrid.settings.fields import describe
from jaxhybrid.settings.read import load_config, parse_config, to_yaml
from jaxhybrid.settings.run import (
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    MeshConfig,
    MixerConfig,
    RecallConfig,
    RunConfig,
    SelectConfig,
    validate_against,
)
from jaxhybrid.settings.stages import (
    AlignConfig,
    DistillConfig,
    FinetuneConfig,
    GroupedStageConfig,
    ScoreConfig,
    StabilityConfig,
    StageConfig,
)

__all__ = [
    "UPSTREAM",
    "AlignConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "GroupedStageConfig",
    "MeshConfig",
    "MixerConfig",
    "RecallConfig",
    "RunConfig",
    "ScoreConfig",
    "SelectConfig",
    "StabilityConfig",
    "StageConfig",
    "describe",
    "differences",
    "fingerprint",
    "layers_in_budget",
    "load_config",
    "parse_config",
    "to_yaml",
    "validate_against",
]
