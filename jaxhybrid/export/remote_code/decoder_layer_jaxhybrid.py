"""One layer of a hybrid: softmax or linear attention, then the MLP. torch only."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_jaxhybrid import JaxHybridConfig
from .deltanet_jaxhybrid import JaxHybridDeltaNet
from .fixed_decay_jaxhybrid import JaxHybridFixedDecay
from .gated_deltanet_jaxhybrid import JaxHybridGatedDeltaNet
from .gla_jaxhybrid import JaxHybridGLA
from .kimi_delta_jaxhybrid import JaxHybridKimiDelta
from .linear_attention_jaxhybrid import JaxHybridStateful
from .mamba2_jaxhybrid import JaxHybridMamba2
from .rwkv6_jaxhybrid import JaxHybridRWKV6
from .rwkv7_jaxhybrid import JaxHybridRWKV7
from .softmax_attention_jaxhybrid import JaxHybridAttention, JaxHybridRMSNorm
from .window_attention_jaxhybrid import JaxHybridWindowAttention

LINEAR_MIXERS: dict[str, type[JaxHybridStateful]] = {
    mixer.name: mixer
    for mixer in (
        JaxHybridGatedDeltaNet,
        JaxHybridGLA,
        JaxHybridDeltaNet,
        JaxHybridKimiDelta,
        JaxHybridFixedDecay,
        JaxHybridMamba2,
        JaxHybridRWKV6,
        JaxHybridRWKV7,
        JaxHybridWindowAttention,
    )
}


class JaxHybridMLP(nn.Module):
    """down(f(gate x) * up x): SwiGLU where f is silu, GeGLU where it is gelu."""

    def __init__(self, config: JaxHybridConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.gelu = config.trait("activation", "silu") == "gelu_tanh"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        return self.down_proj((F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * self.up_proj(x))


class JaxHybridMixture(nn.Module):
    """A mixture of experts: a token goes through the `active` MLPs with the largest softmax(gate x), by these weights.

    An expert takes all tokens that chose it; one that no token chose is not computed.
    """

    def __init__(self, config: JaxHybridConfig, experts: dict[str, Any]) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, experts["count"], bias=False)
        self.experts = nn.ModuleList(JaxHybridMLP(config, experts["width"]) for _ in range(experts["count"]))
        self.active, self.normalise = experts["active"], experts["normalise"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        scores = self.gate(tokens).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        weights, chosen = scores.topk(self.active)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(tokens)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            mixed.index_add_(0, token, self.experts[number](tokens[token]) * weights[token, place, None].to(x.dtype))
        return mixed.view_as(x)


class JaxHybridDecoderLayer(GradientCheckpointingLayer):
    """Token mixer, then MLP, with norms before them, after them or around them."""

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        if self.is_linear:
            if config.linear_mixer not in LINEAR_MIXERS:
                raise ValueError(f"linear_mixer {config.linear_mixer!r} is not one of {', '.join(LINEAR_MIXERS)}.")
            self.linear_attn = LINEAR_MIXERS[config.linear_mixer](config, layer_idx)
        else:
            self.self_attn = JaxHybridAttention(config, layer_idx)
        experts = config.trait("experts", None)
        self.mlp = JaxHybridMixture(config, experts) if experts else JaxHybridMLP(config, config.intermediate_size)
        offset = config.trait("norm_offset", False)
        norm = partial(JaxHybridRMSNorm, config.hidden_size, config.rms_norm_eps, offset)
        self.norms = config.trait("norms", "before")
        self.residual_scale = config.trait("residual_scale", 1.0)
        if self.norms != "after":
            self.input_layernorm = norm()
        if self.norms == "around":
            self.pre_feedforward_layernorm = norm()
        self.post_attention_layernorm = norm()  # before the MLP, where no norm comes after a mixer
        if self.norms != "before":
            self.post_feedforward_layernorm = norm()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        **masks: Any,
    ) -> torch.Tensor:
        """`masks`: what its mixer knows of padding and documents."""
        x = hidden_states if self.norms == "after" else self.input_layernorm(hidden_states)
        if self.is_linear:
            mixed = self.linear_attn(x, position_embeddings, cache, **masks)
        else:
            mixed, _ = self.self_attn(x, position_embeddings, cache, **masks)
        if self.norms == "before":
            hidden_states = hidden_states + self.scaled(mixed)
            return hidden_states + self.scaled(self.mlp(self.post_attention_layernorm(hidden_states)))
        hidden_states = hidden_states + self.scaled(self.post_attention_layernorm(mixed))
        x = self.pre_feedforward_layernorm(hidden_states) if self.norms == "around" else hidden_states
        return hidden_states + self.scaled(self.post_feedforward_layernorm(self.mlp(x)))

    def scaled(self, more: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream."""
        return more if self.residual_scale == 1 else more * self.residual_scale
