"""Hybrid of softmax attention and Gated DeltaNet layers for transformers. Part of the exported folder: torch only.

Axes: B batch, T tokens, H query heads, N states of a linear layer, R = H / N queries that read one state, K head width,
C chunk. Projections keep [B,T,heads,K]; attention and the delta rule work on [B,heads,T,K].
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_jaxhybrid import JaxHybridConfig

CHUNK = 64
L2_EPS = 1e-6


# --- the gated delta rule


def chunked_gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t', o_t = S_t' q_t, in chunks (arXiv 2412.06464, section 3.3).

    q [B,N,R,T,K] already scaled, k and v [B,N,T,K], log_decay and beta [B,N,T], state [B,N,K,K]; all float32.
    Returns o [B,N,R,T,K] and the state after the last token. Within a chunk the corrected values solve the unit lower
    triangular system (I + tril(b_i a_i..a_j k_i.k_j)) u = b (v - decay k S), exactly.
    """
    B, N, R, T, K = q.shape
    padding = -T % CHUNK if T > CHUNK else 0
    if padding:  # keys of zero, beta 0 and decay 1 leave the state as it is
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        log_decay, beta = (F.pad(x, (0, padding)) for x in (log_decay, beta))
    C = min(T, CHUNK)
    q = q.reshape(B, N, R, -1, C, K)
    k, v = (x.reshape(B, N, -1, C, K) for x in (k, v))
    beta = beta.reshape(B, N, -1, C, 1)
    log_decay = log_decay.reshape(B, N, -1, C)

    # between[i, j] = a_{j+1} .. a_i, summed from j on: a difference of sums from the start would round by their size.
    past = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)
    between = torch.where(past, log_decay[..., None], 0).cumsum(-2).masked_fill(past.mT, float("-inf")).exp()
    from_start = log_decay.cumsum(-1).exp()[..., None]
    system = beta * (k @ k.mT) * between  # the solver reads below the diagonal only and takes ones on it
    inverse = torch.linalg.solve_triangular(
        system, torch.eye(C, dtype=q.dtype, device=q.device).expand_as(system), upper=False, unitriangular=True
    )
    k_read = k * from_start
    scores = (q @ k[:, :, None].mT) * between[:, :, None]
    q_read = q * from_start[:, :, None]
    k_written = (k * between[..., -1, :, None]).mT
    chunk_decay = from_start[..., -1:, :]

    outputs = []
    for c in range(k.shape[2]):
        # The difference first, the inverse after: the other order subtracts two larger numbers.
        u = inverse[:, :, c] @ (beta[:, :, c] * (v[:, :, c] - k_read[:, :, c] @ state))
        outputs.append(q_read[:, :, :, c] @ state[:, :, None] + scores[:, :, :, c] @ u[:, :, None])
        state = chunk_decay[:, :, c] * state + k_written[:, :, c] @ u
    return torch.cat(outputs, dim=3)[:, :, :, :T], state


def gated_delta_rule_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunked_gated_delta_rule` for a single token: T = 1."""
    state = log_decay.exp()[..., None] * state
    correction = beta[..., None] * (v - k @ state)
    state = state + k.mT @ correction
    return q @ state[:, :, None], state


def causal_convolution(
    x: torch.Tensor, taps: torch.Tensor, past: torch.Tensor | None, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution over real tokens: y_t = sum_w taps[:, w] x_{t-W+1+w}.

    x [B,T,channels], taps [channels,1,W], past [B,channels,W-1] the inputs before x, real [B,T] False on padding, which
    is stepped over as if absent. Returns y and the last W-1 real inputs, for the next call.
    """
    B, T, channels = x.shape
    W = taps.shape[-1]
    past = x.new_zeros(B, channels, W - 1) if past is None else past.to(x.dtype)
    order = None
    if real is not None:  # real tokens first, in their order
        order = real.logical_not().to(torch.int8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        x = x.gather(1, order)
    inputs = torch.cat([past, x.mT], dim=-1)
    y = F.conv1d(inputs, taps.to(x.dtype), groups=channels).mT
    if order is None or real is None:
        return y, inputs[..., T:]
    y = torch.zeros_like(y).scatter(1, order, y)
    last = real.sum(1)[:, None] + torch.arange(W - 1, device=x.device)
    return y, inputs.gather(2, last[:, None].expand(B, channels, W - 1))


# --- small pieces


class JaxHybridRMSNorm(nn.Module):
    """x / rms(x) over the last axis in float32, scaled by the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class JaxHybridRotaryEmbedding(nn.Module):
    """cos and sin of the rotary angles, with the length-extension rules of transformers."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rule = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rule(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: JaxHybridConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat([angles, angles], dim=-1)[:, :, None]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + K/2) of x [B,T,heads,K] in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def eager_attention_forward(
    module: "JaxHybridAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by matrix products; query [B,H,T,K], key and value [B,G,M,K]. Returns [B,T,H,K] and the weights."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# --- layers


class JaxHybridAttention(nn.Module):
    """Causal softmax attention with grouped key/value heads."""

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = K
        self.num_key_value_groups = H // G
        self.scaling = K**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
            self.k_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, K = hidden_states, self.head_dim
        q, k, v = (proj(x).unflatten(-1, (-1, K)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, *position_embeddings), rotate(k, *position_embeddings), v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        backend = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class JaxHybridGatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule, behind optional norms, rotation and convolution."""

    q_conv: nn.Conv1d
    k_conv: nn.Conv1d
    v_conv: nn.Conv1d

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        settings = config.gated_deltanet
        D, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
        N = H if settings["expand_kv"] else config.num_key_value_heads
        self.layer_idx = layer_idx
        self.head_dim, self.num_states = K, N
        self.rope, self.conv_size = settings["rope"], settings["conv_size"]
        self.q_proj = nn.Linear(D, H * K, bias=settings["qkv_bias"])
        self.k_proj = nn.Linear(D, N * K, bias=settings["qkv_bias"])
        self.v_proj = nn.Linear(D, N * K, bias=settings["qkv_bias"])
        self.a_proj = nn.Linear(D, N, bias=False)
        self.b_proj = nn.Linear(D, N, bias=False)
        self.A_log = nn.Parameter(torch.zeros(N))
        self.dt_bias = nn.Parameter(torch.ones(N))
        self.g_proj = nn.Linear(D, H * K, bias=False) if settings["output_gate"] else None
        self.o_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.qk_norm = settings["qk_norm"]
        if self.qk_norm:
            self.q_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
            self.k_norm = JaxHybridRMSNorm(K, config.rms_norm_eps)
        if self.conv_size:
            for name, channels in (("q_conv", H * K), ("k_conv", N * K), ("v_conv", N * K)):
                setattr(self, name, nn.Conv1d(channels, channels, self.conv_size, groups=channels, bias=False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        real: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """`real` [B,T] is False on padding, which neither writes nor decays the state nor enters the convolution."""
        x, K, N = hidden_states, self.head_dim, self.num_states
        B, T, _ = x.shape
        q, k, v = (proj(x).unflatten(-1, (-1, K)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        # Gates in float32: in 16 bits a slow decay rounds to no decay.
        a, b = (proj(x.to(proj.weight.dtype)).float() for proj in (self.a_proj, self.b_proj))

        with torch.autocast(x.device.type, enabled=False):
            past_inputs, state = self._read(past_key_values)
            q, k, v = q.float(), k.float(), v.float()
            last_inputs = None
            if self.conv_size:
                taps = torch.cat([self.q_conv.weight, self.k_conv.weight, self.v_conv.weight])
                joined = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
                joined, last_inputs = causal_convolution(joined, taps, past_inputs, real)
                q, k, v = (y.unflatten(-1, (-1, K)) for y in joined.split([x.shape[2] * K for x in (q, k, v)], dim=-1))
            q, k, v = l2_normalize(F.silu(q)), l2_normalize(F.silu(k)), F.silu(v)
            log_decay = -self.A_log.float().exp() * F.softplus(a + self.dt_bias.float())
            beta = b.sigmoid()
            if real is not None:
                log_decay, beta = log_decay * real[..., None], beta * real[..., None]

            if state is None:
                state = q.new_zeros(B, N, K, K)
            rule = gated_delta_rule_step if T == 1 else chunked_gated_delta_rule
            q = q.unflatten(2, (N, -1)).permute(0, 2, 3, 1, 4) * K**-0.5
            k, v, log_decay, beta = (x.transpose(1, 2) for x in (k, v, log_decay, beta))
            out, state = rule(q, k, v, log_decay, beta, state)
            self._write(past_key_values, last_inputs, state)
            out = self.o_norm(out.permute(0, 3, 1, 2, 4).flatten(2, 3))  # [B,T,H,K]

        if self.g_proj is not None:
            out = out * F.silu(self.g_proj(x).unflatten(-1, (-1, K)).float())
        return self.o_proj(out.flatten(2).to(x.dtype))

    def _read(self, cache: Cache | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        layer: Any = cache.layers[self.layer_idx]
        conv_state, state = layer.conv_states, layer.recurrent_states
        # A tensor each until transformers 5.8 at least, later one per state index.
        return (conv_state[0], state[0]) if isinstance(conv_state, dict) else (conv_state, state)

    def _write(self, cache: Cache | None, conv_state: torch.Tensor | None, state: torch.Tensor) -> None:
        if cache is None:
            return
        # The cache learns from its convolution state that it has a past, its device and, in older versions, its dtype:
        # so a layer without convolution stores one zero, and both states are float32.
        if conv_state is None:
            conv_state = state.new_zeros(state.shape[0], 1, 1)
        cache.update_conv_state(conv_state, self.layer_idx)
        cache.update_recurrent_state(state, self.layer_idx)


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class JaxHybridMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class JaxHybridDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: token mixer, then MLP."""

    def __init__(self, config: JaxHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        if self.is_linear:
            self.linear_attn = JaxHybridGatedDeltaNet(config, layer_idx)
        else:
            self.self_attn = JaxHybridAttention(config, layer_idx)
        self.mlp = JaxHybridMLP(config)
        self.input_layernorm = JaxHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = JaxHybridRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        x = self.input_layernorm(hidden_states)
        if self.is_linear:
            mixed = self.linear_attn(x, position_embeddings, attention_mask, past_key_values)
        else:
            mixed, _ = self.self_attn(x, position_embeddings, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


# --- models


class JaxHybridPreTrainedModel(PreTrainedModel):
    config: JaxHybridConfig
    config_class = JaxHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JaxHybridDecoderLayer"]  # noqa: RUF012  (transformers reads plain class attributes)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be rolled back, so no assisted generation
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "a_proj", "b_proj"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": JaxHybridDecoderLayer, "attentions": JaxHybridAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, JaxHybridGatedDeltaNet):
            init.zeros_(module.A_log)  # A = 1, and steps of softplus(-4.6) = 0.01: a half-life of 69 tokens
            init.constant_(module.dt_bias, -4.6)
            if module.conv_size:  # the current token passes through
                for conv in (module.q_conv, module.k_conv, module.v_conv):
                    init.copy_(conv.weight, F.one_hot(torch.tensor(module.conv_size - 1)).expand_as(conv.weight))


class JaxHybridModel(JaxHybridPreTrainedModel):
    def __init__(self, config: JaxHybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([JaxHybridDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = JaxHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = JaxHybridRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask`: 2-D over past and present tokens, 0 on padding; or one per layer type (`generate` may)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]
        # transformers measures a cache by a softmax layer, so a model without one goes without.
        if use_cache and past_key_values is None and "full_attention" in self.config.layer_types:
            past_key_values = DynamicCache(config=self.config)
        positions: torch.Tensor
        if position_ids is not None:
            positions = position_ids
            if attention_mask is None:
                self._refuse_packing(positions)
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        else:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(past, past + T, device=x.device)[None]

        if isinstance(attention_mask, dict):
            masks: dict[str, Any] = attention_mask
        else:
            masks = self._masks(x, attention_mask, past_key_values, positions)
        tables = self.rotary_emb(x, positions)
        for layer, kind in zip(self.layers, self.config.layer_types):
            x = layer(
                x,
                position_embeddings=tables,
                attention_mask=masks[kind],
                past_key_values=past_key_values,
                position_ids=positions,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _masks(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None, position_ids: torch.Tensor
    ) -> dict[str, Any]:
        masks: dict[str, Any] = {"linear_attention": None}
        if "linear_attention" in self.config.layer_types and attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    f"attention_mask has {attention_mask.ndim} axes: linear attention layers can only leave out whole "
                    "tokens; give a padding mask [batch, tokens]."
                )
            masks["linear_attention"] = attention_mask[:, -x.shape[1] :].bool()
        if "full_attention" in self.config.layer_types:
            masks["full_attention"] = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
        return masks

    def _refuse_packing(self, position_ids: torch.Tensor) -> None:
        if "linear_attention" not in self.config.layer_types or torch.compiler.is_compiling():
            return
        if (position_ids.diff(dim=-1) != 1).any():
            raise ValueError(
                "position_ids restart inside a row: sequences packed this way would leak into each other through the "
                "linear attention states. Put one sequence in each row and pad with attention_mask."
            )


class JaxHybridForCausalLM(JaxHybridPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

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
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,vocabulary] (the last `logits_to_keep` when given) and, with `labels`, the next-token loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["JaxHybridForCausalLM", "JaxHybridModel", "JaxHybridPreTrainedModel"]
