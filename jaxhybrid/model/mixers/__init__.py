"""The token mixers a layer can have. A new one is a class like `GLA` in a file of its own, and a name here."""

from jaxhybrid.model.attention import Attention
from jaxhybrid.model.mixers.deltanet import DeltaNet
from jaxhybrid.model.mixers.fixed_decay import FixedDecay
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNet
from jaxhybrid.model.mixers.gla import GLA
from jaxhybrid.model.mixers.kimi_delta import KimiDelta
from jaxhybrid.model.mixers.linear import LinearMixer
from jaxhybrid.model.mixers.mamba2 import Mamba2
from jaxhybrid.model.mixers.rwkv6 import RWKV6
from jaxhybrid.model.mixers.rwkv7 import RWKV7
from jaxhybrid.model.mixers.window_attention import WindowAttention

LINEAR_MIXERS: dict[str, type[LinearMixer]] = {
    mixer.Config.kind: mixer for mixer in (GatedDeltaNet, GLA, DeltaNet, KimiDelta, FixedDecay, Mamba2, RWKV6, RWKV7)
}
# What a converted layer can have: its state does not grow with the text.
STUDENT_MIXERS: dict[str, type[LinearMixer] | type[WindowAttention]] = {
    **LINEAR_MIXERS,
    WindowAttention.Config.kind: WindowAttention,
}
MIXERS: dict[str, type[Attention] | type[LinearMixer]] = {Attention.kind: Attention, **STUDENT_MIXERS}
