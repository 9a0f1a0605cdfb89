"""A hybrid of jaxhybrid's in vLLM: an export's own layers, with vLLM's attention, cache, embedding and head.

Axes: T the new tokens of all sequences of a step, one after the other; D model width, K head width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from .exported.configuration_jaxhybrid import JaxHybridConfig
from .exported.decoder_layer_jaxhybrid import JaxHybridDecoderLayer
from .exported.softmax_attention_jaxhybrid import JaxHybridAttention, JaxHybridRMSNorm, JaxHybridRotaryTables
from .linear_attention import LinearAttention
from .pages import state_shapes


class SoftmaxAttention(JaxHybridAttention):
    def __init__(self, config: JaxHybridConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, layer)
        self.attn = Attention(
            config.num_attention_heads,
            config.head_dim,
            self.scaling,
            num_kv_heads=config.num_key_value_heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=self.sliding_window,
            prefix=f"{prefix}.attn",
        )

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: None
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [1,T,D]"""
        q, k, v = (x[0].flatten(1) for x in self.projected(hidden_states, position_embeddings))
        return self.o_proj(self.attn(q, k, v))[None], None


class DecoderLayer(JaxHybridDecoderLayer):
    def __init__(self, config: JaxHybridConfig, layer: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, layer)
        if self.is_linear:
            self.linear_attn = LinearAttention(config, layer, vllm_config, f"{prefix}.linear_attn")
        else:
            self.self_attn = SoftmaxAttention(config, layer, vllm_config, f"{prefix}.self_attn")


class Model(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: JaxHybridConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = JaxHybridRMSNorm(config.hidden_size, config.rms_norm_eps, config.trait("norm_offset", False))
        self.rotary_tables = JaxHybridRotaryTables(config)
        self.embedding_scale = config.trait("embedding_scale", 1.0)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T,D] and positions [T] -> [T,D]"""
        x = x[None]
        if self.embedding_scale != 1:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype, device=x.device)
        for layer, tables in zip(self.layers, self.rotary_tables(x, positions[None])):
            x = layer(x, position_embeddings=tables, cache=None)
        return self.norm(x)[0]


class JaxHybridForCausalLM(nn.Module, HasInnerState, IsHybrid):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={".linear_attn.": ".linear_attn.mixer."})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: JaxHybridConfig = vllm_config.model_config.hf_config
        self.config = config
        self.model = Model(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=config.trait("logit_scale", 1.0))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(x, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return torch.float32, torch.float32

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """Of pages that prefix caching keeps: both states as they are."""
        return get_temporal_copy_spec, get_temporal_copy_spec
