"""DeltaNet (arXiv 2406.06484): the delta rule without a decay. What is not written over stays.

S_t = (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t',   o_t = S_t' q_t / sqrt(K),   b_t = sigmoid(b_proj x)
"""

from dataclasses import dataclass

import jax
from flax import nnx

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers.delta import DeltaRule, DeltaRuleConfig


@dataclass(frozen=True)
class DeltaNetConfig(DeltaRuleConfig):
    """A DeltaNet layer as in fla, which has a convolution of 4 taps."""

    kind = "deltanet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_init != "fla":
            raise ConfigError(f"mixer.decay_init={self.decay_init!r}: deltanet has no decay; leave it out.")


class DeltaNet(DeltaRule):
    Config = DeltaNetConfig
    title = "DeltaNet, arXiv 2406.06484"
    calibrates = ("strength", "gate")

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.b_proj = self.write_strengths(config, rngs)
        self.add_convolutions(config, rngs)

    def log_decay(self, x_BTD: jax.Array) -> None:
        return None
