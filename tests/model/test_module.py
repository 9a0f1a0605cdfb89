"""The model as one module: equal logits, there and back, and the tools that take modules."""

import io
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from jaxhybrid.errors import WeightsError
from jaxhybrid.model.config import FULL_ATTENTION as F
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.module import model_of, module
from jaxhybrid.model.transformer import forward
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher

MIXERS = {
    "gated_deltanet": (GatedDeltaNetConfig(conv_size=3), {"qkv_bias": True, "mlp_bias": True}),
    "gla": (GLAConfig(), {"qk_norm": True, "tie_embeddings": True}),
}


@pytest.fixture(scope="module", params=MIXERS)
def model(request):
    mixer, changes = MIXERS[request.param]
    return convert(make_teacher(num_layers=3, **changes), (mixer.kind, F, mixer.kind), mixer, jax.random.key(1))


def test_logits_are_those_of_the_model(model, batch):
    expected = forward(model, batch["tokens"], batch["segment_ids"])
    actual, _ = nnx.jit(lambda net, tokens, segments: net(tokens, segment_ids=segments))(
        module(model), batch["tokens"], batch["segment_ids"]
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_padding_of_an_attention_mask_is_seen(model, batch):
    real = (batch["segment_ids"] != 0).astype(np.int32)
    mask = np.tril(np.ones((24, 24), bool))[None] & (real[:, None] == 1) & (real[:, :, None] == 1)
    call = nnx.jit(lambda net, tokens, mask: net(tokens, attention_mask=mask))
    found, _ = call(module(model), batch["tokens"], mask)
    expected = forward(model, batch["tokens"], real)
    np.testing.assert_allclose(found * real[..., None], expected * real[..., None], atol=1e-5)


def test_there_and_back(model):
    again = model_of(module(model))
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_change_in_one_layer_is_one_in_the_model(model, batch):
    net = module(model)
    kernel = net.layers[2].block.mlp.up_proj.kernel
    kernel.set_value(kernel[...] * 2)
    changed = model_of(net)
    up_proj = model.params["blocks"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(changed.params["blocks"]["mlp"]["up_proj"]["kernel"], up_proj.at[2].multiply(2))
    logits = forward(changed, batch["tokens"])
    assert np.abs(logits - forward(model, batch["tokens"])).max() > 1e-3
    np.testing.assert_allclose(net(batch["tokens"])[0], logits, atol=1e-5)


@pytest.fixture(scope="module")
def adapted(model):
    provider = qwix.LoraProvider(module_path=".*(q_proj|o_proj|mlp/up_proj|head)", rank=3, alpha=8.0)
    return qwix.apply_lora_to_model(module(model), provider, jnp.zeros((8, 24), int), rngs=nnx.Rngs(0))


def test_lora_of_qwix_trains_beside_frozen_weights(model, adapted, batch):
    adapters = nnx.state(adapted, nnx.LoRAParam)
    head = 0 if model.config.tie_embeddings else 1
    assert len(jax.tree.leaves(adapters)) == (3 * 3 + head) * 2  # layers, projections, A and B

    def loss(net):
        logits = net(batch["tokens"])[0]
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3]), logits

    step = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True))
    gradients, logits = step(adapted)
    np.testing.assert_allclose(logits, forward(model, batch["tokens"]), atol=1e-5)  # B is zero
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_lora_is_merged_into_the_weights(model, adapted, batch):
    with pytest.raises(WeightsError, match=r"kernel_lora_a.*Merge LoRA"):
        model_of(adapted)
    rng, net = np.random.default_rng(5), nnx.clone(adapted)
    nnx.update(net, jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype("f"), nnx.state(net, nnx.LoRAParam)))
    expected, _ = nnx.jit(lambda net, tokens: net(tokens))(net, batch["tokens"])
    merged = model_of(net, lora_alpha=8.0)
    assert np.abs(expected - forward(model, batch["tokens"])).max() > 0.1
    np.testing.assert_allclose(forward(merged, batch["tokens"]), expected, atol=2e-4)

    linear = net.layers[1].mixer.o_proj  # two input axes
    A, B, W = (np.asarray(x[...], np.float64) for x in (linear.kernel_lora_a, linear.kernel_lora_b, linear.kernel))
    found = merged.params["mixers"]["full_attention"]["o_proj"]["kernel"][0]
    np.testing.assert_allclose(found, W + 8 / 3 * np.einsum("hkr,rd->hkd", A, B), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_merged_is_refused(batch):
    net = module(make_teacher(num_layers=1))
    with pytest.raises(WeightsError, match=r"lora_alpha=8.0, but the module has no LoRA"):
        model_of(net, lora_alpha=8.0)
    provider = qwix.LoraProvider(module_path=".*mlp/.*", rank=2, alpha=8.0, weight_qtype=jnp.int8)
    net = qwix.apply_lora_to_model(net, provider, batch["tokens"], rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match="turn quantised weights back"):
        model_of(net, lora_alpha=8.0)


def test_int8_of_qwix_is_near(model, batch):
    net = qwix.quantize_model(
        module(model),
        qwix.PtqProvider([qwix.QuantizationRule(module_path=".*(_proj|mlp).*", weight_qtype=jnp.int8)]),
        batch["tokens"],
    )
    quantised = [x for x in jax.tree.leaves(nnx.state(net)) if x.dtype == jnp.int8]
    assert len(quantised) >= 3 * 7  # q, k, v, o and three of the MLP, each layer
    expected = np.asarray(jax.nn.log_softmax(forward(model, batch["tokens"])))
    actual = np.asarray(jax.nn.log_softmax(net(batch["tokens"])[0]))
    assert 0 < np.mean(np.sum(np.exp(expected) * (expected - actual), -1)) < 0.01


def test_it_can_be_displayed(model):
    with redirect_stdout(io.StringIO()) as shown:
        nnx.display(module(model))
    assert "up_proj" in shown.getvalue()
