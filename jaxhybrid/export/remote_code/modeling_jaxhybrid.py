"""Hybrid of softmax and linear attention layers for transformers. Part of the exported folder: torch only.

Axes: B batch, T tokens. No keyword is swallowed: what a forward does not name it refuses.
"""

import math
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_jaxhybrid import JaxHybridConfig
from .decoder_layer_jaxhybrid import LINEAR_MIXERS, JaxHybridDecoderLayer
from .linear_attention_jaxhybrid import JaxHybridGateProjection, JaxHybridShortConvolution, JaxHybridStateful
from .packing_jaxhybrid import Layout, is_padding_mask, lay_out, real_tokens, softmax_mask
from .softmax_attention_jaxhybrid import (
    JaxHybridAttention,
    JaxHybridRMSNorm,
    JaxHybridRotaryEmbedding,
    JaxHybridRotaryTables,
    capped,
)

# What transformers calls a cache: `past_key_values` until 5.23, then `cache`.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
LAYOUT = 1  # which convolution state of the first linear layer holds the layout's memory; 0 is its convolution's own


class JaxHybridLinearCache(DynamicCache):
    """The cache of a model without softmax layers, of which transformers would ask its length."""

    is_compileable = False  # as with a DynamicCache, `generate` shall not compile by itself

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layer: Any = self.layers[0]
        return int(layer.conv_states[LAYOUT][0, 0, -1]) if layer.has_previous_state[LAYOUT] else 0


class JaxHybridPreTrainedModel(PreTrainedModel):
    config: JaxHybridConfig
    config_class = JaxHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JaxHybridDecoderLayer"]  # noqa: RUF012  (transformers reads plain class attributes)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be rolled back, so no assisted generation
    # With their place: transformers finds these anywhere in a name, and a part of another mixer may end alike.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        f"linear_attn.{name}" for mixer in LINEAR_MIXERS.values() for name in mixer.float32
    ]
    _can_record_outputs = {"hidden_states": JaxHybridDecoderLayer, "attentions": JaxHybridAttention}  # noqa: RUF012

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        """Asked before sdpa is used. Where the user has chosen nothing, an error makes transformers take eager."""
        if (cap := self.config.trait("attention_cap", None)) is not None:
            raise ValueError(
                f'sdpa has no cap of scores, and this model has one of {cap}: load it with attn_implementation="eager" '
                'or "flex_attention".'
            )
        return super()._sdpa_can_dispatch(is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, JaxHybridGateProjection):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, JaxHybridShortConvolution):  # the current token passes through
            init.copy_(module.weight, F.one_hot(torch.tensor(module.weight.shape[-1] - 1)).expand_as(module.weight))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, JaxHybridStateful):
            module.init_own_weights()
        elif isinstance(module, JaxHybridRMSNorm):
            (init.zeros_ if module.offset else init.ones_)(module.weight)
        elif isinstance(module, JaxHybridRotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies()[0])


class JaxHybridModel(JaxHybridPreTrainedModel):
    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([JaxHybridDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = JaxHybridRMSNorm(config.hidden_size, config.rms_norm_eps, config.trait("norm_offset", False))
        self.rotary_tables = JaxHybridRotaryTables(config)
        self.window = config.trait("window", None)
        self.gradient_checkpointing = False
        self.linear_layer = next((i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"), None)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """The last hidden states [B,T,hidden] and the cache.

        attention_mask: 2-D over the tokens in the cache and the new ones, 0 on padding; or one per layer type, as
            `generate` makes them for a static cache.
        position_ids, cu_seq_lens_q, seq_idx: any of them tells where documents start in packed rows.
        past_key_values: another name for `cache`.
        max_length_q, max_length_k: of no use here, but part of what cu_seq_lens come with.

        Raises:
            ValueError: what is given contradicts itself, or cannot be honoured.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if (scale := self.config.trait("embedding_scale", 1.0)) != 1:
            x = x * torch.tensor(scale, dtype=x.dtype, device=x.device)
        if not x.shape[1]:
            raise ValueError(f"The input has no tokens: its shape is {tuple(x.shape[:2])}.")
        cache = self._checked_cache(cache, past_key_values)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs the model loaded with attn_implementation="eager".')

        memory = self._memory(x, attention_mask, cache)
        columns = 0 if memory is None else memory[0, 0, -1]
        real = real_tokens(self.config, x, attention_mask, columns)
        layout = lay_out(x, real, position_ids, (cu_seq_lens_q, cu_seq_lens_k), seq_idx, memory)
        if use_cache and cache is None:
            cache = self._new_cache(layout)
        mask = partial(softmax_mask, self.config, x, attention_mask, {CACHE_NAME: cache}, columns, layout)
        linear: dict[str, Any] = {"real": layout.real, "first": layout.first}
        full, sliding = mask(), {} if self.window is None else mask(self.window["size"])
        if (a := self.config.softmax.get("length_scale")) is not None:
            scale = torch.log(layout.positions.float() + a)[..., None, None] / math.log(a)
            full, sliding = full | {"query_scale": scale}, sliding | {"query_scale": scale}
        tables = self.rotary_tables(x, layout.positions)
        for number, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types)):
            softmax = full if self.config.window_of(number) is None else sliding
            arguments = linear if kind == "linear_attention" else softmax
            x = layer(x, position_embeddings=tables[number], cache=cache, **arguments)
        if cache is not None and self.linear_layer is not None:
            device = self._state(cache).device
            cache.update_conv_state(layout.memory.to(device), self.linear_layer, LAYOUT)
        outputs: dict[str, Any] = {"last_hidden_state": self.norm(x), CACHE_NAME: cache}
        return BaseModelOutputWithPast(**outputs)

    def _checked_cache(self, cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names for one thing; give one of them.")
        cache = past_key_values if cache is None else cache
        if cache is None:
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "Gradient checkpointing runs a layer twice, which would fill the cache twice; give no cache."
            )
        made = len(getattr(cache, "layers", ())) == len(self.layers)
        if self.linear_layer is not None and not (made and hasattr(self._state(cache), "conv_states")):
            raise ValueError("The cache was not made for this model: make it with DynamicCache(config=model.config).")
        return cache

    def _state(self, cache: Cache) -> Any:
        """The state of the first linear layer."""
        return cache.layers[self.linear_layer]  # type: ignore[index]

    def _memory(self, x: torch.Tensor, attention_mask: Any, cache: Cache | None) -> torch.Tensor | None:
        """What the cache tells of earlier calls, [B,1,3] as in `Layout.memory`; None when there were none."""
        if cache is None:
            return None
        if self.linear_layer is not None:
            state = self._state(cache)
            return state.conv_states[LAYOUT].to(x.device) if state.has_previous_state[LAYOUT] else None
        columns = cache.get_seq_length()
        if not torch.compiler.is_compiling() and not columns:
            return None
        real = attention_mask[:, : -x.shape[1]].sum(1) if is_padding_mask(attention_mask) else columns
        zero = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        return torch.stack([zero + real - 1, zero, zero + columns], dim=-1)[:, None]

    def _new_cache(self, layout: Layout) -> Cache | None:
        if "full_attention" not in self.config.layer_types:
            return JaxHybridLinearCache(config=self.config)
        if self.linear_layer is None and layout.start is not None:
            return None  # it could not tell later calls where their document began
        return DynamicCache(config=self.config)


class JaxHybridForCausalLM(JaxHybridPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch, and leaves it to the loss

    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__(config)
        self.model = JaxHybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,vocabulary] and, with `labels`, the next-token loss; the rest as `JaxHybridModel.forward`.

        logits_to_keep: compute the last so many, or those at a 1-D tensor of places.
        num_items_in_batch: what the loss is divided by; default the labels in this call.
        shift_labels: labels already moved to the token before, used in place of `labels`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            seq_idx=seq_idx,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim != 1:
            raise ValueError(
                f"logits_to_keep has {logits_to_keep.ndim} axes; give a number, or the places as a 1-D tensor."
            )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        if (scale := self.config.trait("logit_scale", 1.0)) != 1:
            logits = logits * scale
        logits = capped(logits, self.config.trait("logit_cap", None))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """As transformers does, but a model without softmax layers gets the cache that knows its length."""
        given, parent = model_kwargs.get(CACHE_NAME), cast(Any, super())
        parent._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        made = given is None and model_kwargs.get(CACHE_NAME) is not None
        if made and "full_attention" not in self.config.layer_types:
            model_kwargs[CACHE_NAME] = JaxHybridLinearCache(config=self.config)


__all__ = ["JaxHybridForCausalLM", "JaxHybridModel", "JaxHybridPreTrainedModel"]
