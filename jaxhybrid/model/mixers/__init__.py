"""The token mixers a layer can have. A new one is a class like `GLA` in a file of its own, and a name here."""

from jaxhybrid.model.attention import Attention
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNet
from jaxhybrid.model.mixers.gla import GLA
from jaxhybrid.model.mixers.linear import LinearMixer

LINEAR_MIXERS: dict[str, type[LinearMixer]] = {mixer.Config.kind: mixer for mixer in (GatedDeltaNet, GLA)}
MIXERS: dict[str, type[Attention] | type[LinearMixer]] = {Attention.kind: Attention, **LINEAR_MIXERS}
