"""The exported torch model against transformers' own, against a token-by-token recurrence, and against itself."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from jaxhybrid.export.remote_code.configuration_jaxhybrid import JaxHybridConfig
from jaxhybrid.export.remote_code.delta_rule_jaxhybrid import chunked_gated_delta_rule, gated_delta_rule_step
from jaxhybrid.export.remote_code.gated_deltanet_jaxhybrid import JaxHybridGatedDeltaNet
from jaxhybrid.export.remote_code.modeling_jaxhybrid import JaxHybridForCausalLM
from tests.export.models import DEFAULT_ROPE, FULL, GLA, HYBRID, PLAIN, SHAPE, make_model, shaken, tokens


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- against transformers


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope", ROPES)
def test_all_softmax_equals_llama(rope):
    rope_parameters = {"rope_type": rope, "rope_theta": 1000.0} | ROPES[rope]
    settings = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope_parameters}
    native = shaken(LlamaForCausalLM(LlamaConfig(**SHAPE | settings)).eval())
    ours = make_model(layer_types=["full_attention"] * 3, **settings)
    ours.load_state_dict(native.state_dict())
    x = tokens(2, 90)  # beyond max_position_embeddings, where the dynamic rule acts
    with torch.no_grad():
        assert (ours(x).logits - native(x).logits).abs().max() < 1e-5


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "native_class", "config_class"),
    [
        ("mistral", MistralForCausalLM, MistralConfig),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config),
        ("qwen3", Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_all_softmax_equals_the_other_families(kind, native_class, config_class, attn):
    native = native_class._from_config(config_class(**SHAPE, rope_parameters=DEFAULT_ROPE), attn_implementation=attn)
    shaken(native.eval())
    ours = make_model(layer_types=["full_attention"] * 3, base_model_type=kind, attn=attn)
    ours.load_state_dict(native.state_dict())
    x, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = native(x, attention_mask=mask, position_ids=positions).logits
        assert ((ours(x, attention_mask=mask).logits - expected) * mask[..., None]).abs().max() < 1e-5


def test_linear_layer_equals_qwen35():
    """Qwen3.5's linear layer is ours with heads expanded, an output gate and a convolution."""
    config = Qwen3_5TextConfig(
        hidden_size=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    native = shaken(Qwen3_5GatedDeltaNet(config, 0))
    native.A_log.data.uniform_(-2, 0)  # decays whose sums over a chunk stay small: theirs are differences of such sums
    ours = JaxHybridGatedDeltaNet(make_model(PLAIN | {"conv_size": 4}).config, 0)
    source = native.state_dict()
    parts = dict(zip("qkv", source["in_proj_qkv.weight"].split(32)), g=source["in_proj_z.weight"])
    parts |= {"a": source["in_proj_a.weight"], "b": source["in_proj_b.weight"], "o": source["out_proj.weight"]}
    weights = {f"{name}_proj.weight": weight for name, weight in parts.items()}
    weights |= {f"{name}_conv.weight": taps for name, taps in zip("qkv", source["conv1d.weight"].split(32))}
    weights |= {name: source[name] for name in ("A_log", "dt_bias")} | {"o_norm.weight": source["norm.weight"]}
    ours.load_state_dict(weights)
    x = torch.randn(2, 150, 32)
    with torch.no_grad():
        assert (ours(x, (None, None), None, None, None) - native(x)).abs().max() < 1e-5


# --- the delta rule


@pytest.mark.parametrize("length", [1, 5, 64, 65, 200])
def test_chunks_equal_the_recurrence(length):
    B, N, R, K = 2, 3, 2, 8
    q, k, v = torch.randn(B, N, R, length, K), torch.randn(B, N, length, K), torch.randn(B, N, length, K)
    k = k / k.norm(dim=-1, keepdim=True)
    beta, log_decay = torch.rand(B, N, length), -3 * torch.rand(B, N, length) ** 4
    log_decay[:, :, length // 2] = -200.0  # a token that forgets everything
    start = torch.randn(B, N, K, K)
    out, state = chunked_gated_delta_rule(q, k, v, log_decay, beta, start)
    expected, expected_state = [], start.double()
    for t in range(length):
        at = slice(t, t + 1)
        inputs = (q[..., at, :], k[..., at, :], v[..., at, :], log_decay[..., at], beta[..., at])
        o, expected_state = gated_delta_rule_step(*(x.double() for x in inputs), expected_state)
        expected.append(o)
    assert (out - torch.cat(expected, dim=3)).abs().max() < 2e-5
    assert (state - expected_state).abs().max() < 2e-5


# --- caches and padding


@pytest.mark.parametrize("linear", [PLAIN, FULL, GLA], ids=["plain", "full", "gla"])
def test_cached_forward_equals_whole(linear):
    model, x = make_model(linear), tokens(2, 90)
    with torch.no_grad():
        whole, cache = model(x).logits, DynamicCache(config=model.config)
        pieces = [slice(0, 2), slice(2, 40), slice(40, 41), slice(41, 85), *(slice(t, t + 1) for t in range(85, 90))]
        parts = [model(x[:, at], past_key_values=cache).logits for at in pieces]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@pytest.mark.parametrize("linear", [PLAIN, FULL, GLA], ids=["plain", "full", "gla"])
@pytest.mark.parametrize("hole", [slice(0, 7), slice(30, 37), slice(83, 90)], ids=["left", "inside", "right"])
def test_padding_equals_none(linear, hole):
    model, x = make_model(linear), tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[:, hole] = 0
    kept = mask[0].bool()
    with torch.no_grad():
        padded = model(x, attention_mask=mask).logits[:, kept]
        bare = model(x[:, kept]).logits
        # The same with the padding in the cache, and tokens after it.
        first = model(x[:, :60], attention_mask=mask[:, :60])
        rest = model(x[:, 60:], attention_mask=mask, past_key_values=first.past_key_values).logits[:, kept[60:]]
    assert (padded - bare).abs().max() < 1e-4
    assert (rest - bare[:, kept[:60].sum() :]).abs().max() < 1e-4


@pytest.mark.parametrize("linear", [PLAIN, FULL, GLA], ids=["plain", "full", "gla"])
def test_generation(linear):
    model = make_model(linear)
    model.generation_config.eos_token_id = None
    prompts = [tokens(1, length) for length in (3, 9, 17)]
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    single = [model.generate(p, **greedy)[0, p.shape[1] :] for p in prompts]
    for prompt, expected in zip(prompts, single):
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(prompt, **greedy, **options)[0, prompt.shape[1] :], expected), options
    batch = torch.cat([torch.nn.functional.pad(p, (17 - p.shape[1], 0)) for p in prompts])
    together = model.generate(batch, attention_mask=(batch != 0).long(), **greedy)[:, 17:]
    assert torch.equal(together, torch.stack(single))
    beams = {"num_beams": 3} | greedy
    assert torch.equal(model.generate(prompts[2], **beams), model.generate(prompts[2], use_cache=False, **beams))


def test_all_linear_model():
    """transformers measures a cache by a softmax layer: a model without one measures its own."""
    model, x = make_model(FULL, layer_types=["linear_attention"] * 3), tokens(1, 20)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(x, use_cache=False, **greedy)
    for options in ({}, {"cache_implementation": "static"}, {"inputs_embeds": model.model.embed_tokens(x)}):
        assert torch.equal(model.generate(x, **greedy, **options)[:, -6:], expected[:, -6:]), options
    with torch.no_grad():
        whole = model(x).logits
        for cache in (model(x[:, :7])[1], DynamicCache(config=model.config)):
            past = 7 if cache.has_previous_state(0, 0) else 0
            parts = [model(x[:, at], cache=cache).logits for at in (slice(past, 12), slice(12, 20))]
            assert (torch.cat(parts, 1) - whole[:, past:]).abs().max() < 1e-4


# --- arguments


def test_both_names_of_a_cache():
    model, x = make_model(FULL), tokens(1, 12)
    with torch.no_grad():
        whole = model(x).logits[:, 8:]
        for forward in (model, model.model):
            for name in ("cache", "past_key_values"):
                cache = DynamicCache(config=model.config)
                forward(x[:, :8], **{name: cache})
                assert (model(x[:, 8:], **{name: cache}).logits - whole).abs().max() < 1e-4
            cache = DynamicCache(config=model.config)
            forward(x, cache=cache, past_key_values=cache)
            with pytest.raises(ValueError, match="two names"):
                forward(x, cache=cache, past_key_values=DynamicCache(config=model.config))


def test_no_keyword_is_swallowed():
    model, x = make_model(), tokens(1, 8)
    for forward in (model, model.model):
        for name in ("attention_maks", "cache_position", "is_causal", "token_type_ids", "output_router_logits"):
            with pytest.raises(TypeError, match=f"'{name}'"):
                forward(x, **{name: None})
    with pytest.raises(ValueError, match="attention_maks"):
        model.generate(x, attention_maks=torch.ones_like(x), max_new_tokens=1)


def test_outputs_that_can_be_asked_for():
    model, x = make_model(FULL, attn="eager"), tokens(2, 8)
    out = model(x, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 8, 32)] * 4
    assert [a.shape for a in out.attentions] == [(2, 4, 8, 8)]  # of the softmax layer
    assert torch.equal(model(x, return_dict=False)[0], out.logits)
    assert torch.equal(model(x, logits_to_keep=3).logits, out.logits[:, -3:])
    assert torch.equal(model(x, logits_to_keep=torch.tensor([2, 5])).logits, out.logits[:, [2, 5]])
    with pytest.raises(ValueError, match="logits_to_keep has 2 axes"):
        model(x, logits_to_keep=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        make_model(attn="sdpa")(x, output_attentions=True)


def test_loss():
    model, x = make_model(), tokens(2, 9)
    assert model.accepts_loss_kwargs
    logits = model(x).logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, x[:, 1:].flatten(), reduction="sum")
    shifted = torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100)
    for arguments in ({"labels": x}, {"shift_labels": shifted}, {"labels": x, "num_items_in_batch": 16}):
        assert torch.allclose(model(x, **arguments).loss, total / 16), arguments.keys()
    assert torch.allclose(model(x, labels=x, num_items_in_batch=torch.tensor(5)).loss, total / 5)


def test_what_it_cannot_honour_is_refused():
    model, x = make_model(), tokens(1, 8)
    with pytest.raises(ValueError, match="padding mask"):
        model(x, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"no tokens: its shape is \(1, 0\)"):
        model(x[:, :0])
    with pytest.raises(ValueError, match="exactly one"):
        model(x, inputs_embeds=model.model.embed_tokens(x))
    for cache in (DynamicCache(), DynamicCache(config=LlamaConfig(**SHAPE)), ((x, x),)):
        with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
            model(x, past_key_values=cache)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="fill the cache twice"):
        model(x, past_key_values=DynamicCache(config=model.config))


def test_dynamic_rope_forgets_longer_texts():
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
    model, x = make_model(FULL, rope_parameters=rope), tokens(1, 100)
    with torch.no_grad():
        before = model(x[:, :70]).logits  # beyond max_position_embeddings of 64
        model(x)
        assert torch.equal(model(x[:, :70]).logits, before)


def test_compiled_in_one_piece():
    """As `generate` compiles it for a static cache: a graph break would fail."""
    model, x = make_model(FULL, layer_types=["linear_attention", "full_attention"], num_hidden_layers=2), tokens(2, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
        for cache in caches:
            model(x, position_ids=torch.cat([torch.arange(8), torch.arange(12)])[None], past_key_values=cache)
        token, place = tokens(2, 1), torch.full((2, 1), 12)
        logits = [f(token, position_ids=place, past_key_values=c).logits for f, c in zip((model, compiled), caches)]
        assert (logits[0] - logits[1]).abs().max() < 1e-5


# --- training, dtypes, files


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(checkpointing):
    model, x = make_model(FULL).train(), tokens(2, 70)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(x, labels=x).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_through_chunks_is_exact():
    shapes = [(1, 1, 2, 70, 4), (1, 1, 70, 4), (1, 1, 70, 4), (1, 1, 70), (1, 1, 70), (1, 1, 4, 4)]
    q, k, v, decay, beta, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    k, decay, beta = k / k.norm(dim=-1, keepdim=True), -decay.abs(), beta.sigmoid()
    inputs = [x.requires_grad_() for x in (q, k, v, decay, beta, state)]
    assert torch.autograd.gradcheck(chunked_gated_delta_rule, inputs, fast_mode=True)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(tmp_path, tied):
    model, x = make_model(FULL, tie_word_embeddings=tied), tokens(1, 30)
    model.save_pretrained(tmp_path)
    loaded = JaxHybridForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    half = JaxHybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = half.model.layers[0].linear_attn
    assert layer.q_proj.weight.dtype == torch.bfloat16
    whole = model.model.layers[0].linear_attn
    for kept in ("A_log", "dt_bias", "a_proj.weight", "b_proj.weight"):
        assert torch.equal(layer.get_parameter(kept), whole.get_parameter(kept)), kept
    with torch.no_grad():
        scale = model(x).logits.std()
        assert (half(x).logits.float() - model(x).logits).abs().mean() < 0.1 * scale
    everything_half = loaded.to(torch.bfloat16)  # decays too, by the user's wish
    assert everything_half(x).logits.isfinite().all()
    gates, inputs = everything_half.model.layers[0].linear_attn.a_proj, torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(gates(inputs), inputs.float() @ gates.weight.float().T)  # but gates still in float32


def test_fresh_linear_layers_start_sensibly():
    model = JaxHybridForCausalLM(JaxHybridConfig(**SHAPE, layer_types=HYBRID, gated_deltanet=FULL))
    layer = model.model.layers[0].linear_attn
    assert torch.equal(layer.k_conv.weight[:, 0], torch.tensor([[0.0, 0, 0, 1]]).expand(16, 4))
    assert torch.allclose(
        layer.A_log.exp() * torch.nn.functional.softplus(layer.dt_bias), torch.tensor(0.01), atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traits": {"sinks": 4}}, "sinks"),
        ({"layer_types": ["linear_attention", "mamba3", "full_attention"]}, "mamba3"),
        ({"gated_deltanet": PLAIN | {"qk_norm": None}}, "lacks qk_norm"),
        ({"linear_mixer": "mamba"}, "linear_mixer 'mamba'"),
        ({"linear_mixer": "gla"}, "gla lacks expand_kv"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        JaxHybridForCausalLM(JaxHybridConfig(**SHAPE | {"layer_types": HYBRID, "gated_deltanet": PLAIN} | changes))
