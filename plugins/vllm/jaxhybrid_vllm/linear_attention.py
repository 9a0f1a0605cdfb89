"""A linear layer of an export in vLLM: its states lie in vLLM's hybrid cache. Axes as in pages.py; D model width."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from .exported.configuration_jaxhybrid import JaxHybridConfig
from .pages import Group, Pages, grouped, make_mixer, state_shapes


@dataclass
class StepOfSequences:
    """What linear layers know of a step."""

    groups: list[Group]


class StepBuilder(AttentionMetadataBuilder[StepOfSequences]):
    """Made once a step for all linear layers of a cache group, from what the host knows: no wait for the device."""

    _cudagraph_support = AttentionCGSupport.NEVER  # the groups differ in number and shape from step to step
    reorder_batch_threshold = 1  # sequences with one new token stand first

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepOfSequences:
        step = common_attn_metadata
        cache_mode = self.vllm_config.cache_config.mamba_cache_mode
        slots = mamba_get_block_table_tensor(step.block_table_tensor, step.seq_lens, self.kv_cache_spec, cache_mode)
        # The bound is exact for sequences that are still read in; others have a past, which is all that is asked.
        bound = step.seq_lens_cpu_upper_bound
        lengths = (step.seq_lens.cpu() if bound is None else bound).tolist()
        return StepOfSequences(grouped(step.query_start_loc_cpu.tolist(), lengths[: step.num_reqs], slots[:, 0]))


class LinearAttentionBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "JAXHYBRID"

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class LinearAttention(nn.Module, MambaBase):
    def __init__(self, config: JaxHybridConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.mixer = make_mixer(config, layer)
        self.shapes = state_shapes(config)
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"There are two layers called {prefix}.")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return torch.float32, torch.float32

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LinearAttentionBackend

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: None
    ) -> torch.Tensor:
        """hidden_states [1,T,D]: the new tokens of all sequences of a step, one after the other."""
        x, steps = hidden_states, get_forward_context().attn_metadata
        if steps is None:  # vLLM measures what memory a step takes
            return self.mixer(x, position_embeddings, None, None, None)
        out = torch.zeros_like(x)
        for group in steps[self.prefix].groups:
            pages = Pages(*self.kv_cache, group.slots, group.started)
            cos, sin = (table[0, group.tokens] for table in position_embeddings)
            out[0, group.tokens] = self.mixer(x[0, group.tokens], (cos, sin), pages, None, None)
        return out
