"""The token mixers a layer can have. Each module offers `declare`, `initial_state` and `apply`."""

from types import ModuleType

from jaxhybrid.model import attention
from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET
from jaxhybrid.model.mixers import gated_deltanet

MIXERS: dict[str, ModuleType] = {FULL_ATTENTION: attention, GATED_DELTANET: gated_deltanet}
