"""The vLLM plugin's part that needs no vLLM: linear mixers whose states lie in pages."""

import pytest
import torch

from jaxhybrid.export.remote_code.configuration_jaxhybrid import JaxHybridConfig
from plugins.vllm.jaxhybrid_vllm.pages import MIXERS, Pages, grouped, make_mixer, state_shapes

D, K = 32, 8
SETTINGS = {
    "expand_kv": False, "output_gate": True, "rope": True, "qkv_bias": True, "qk_norm": True, "conv_size": 3,
    "ssm_conv_size": 4, "decay_rank": 4, "low_rank": 32, "form": "lightning", "decay_init": "fla",
}  # fmt: skip
# Two sequences' new tokens by step: they come in pieces, one is alone for a while, both go on token by token.
STEPS = ((0, 5), (0, 40), (17, 40), (1, 1), (1, 1), (20, 1))


def config_of(mixer, **changes):
    return JaxHybridConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=K, num_hidden_layers=2,
        layer_types=["full_attention", "linear_attention"], linear_mixer=mixer, **{mixer: SETTINGS | changes},
    )  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_steps_over_pages_equal_whole_texts(name):
    torch.manual_seed(0)
    config = config_of(name)
    mixer = make_mixer(config, 1)
    lengths = [sum(step[i] for step in STEPS) for i in range(2)]
    texts = [torch.randn(length, D) for length in lengths]
    angles = torch.randn(max(lengths), K // 2).repeat(1, 2)

    def rotation(positions):
        return angles[positions].cos()[:, :, None], angles[positions].sin()[:, :, None]

    pages = [torch.full((4, *shape), torch.nan) for shape in state_shapes(config)]  # what was there before is not read
    slots, done, given = torch.tensor([3, 1], dtype=torch.int32), [0, 0], [[], []]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
        for step in STEPS:
            x = torch.cat([texts[i][done[i] : done[i] + step[i]] for i in range(2)])[None]
            places = torch.cat([torch.arange(done[i], done[i] + step[i]) for i in range(2)])
            out = torch.full_like(x, torch.nan)
            done = [done[i] + step[i] for i in range(2)]
            for group in grouped([0, step[0], sum(step)], done, slots):
                turns = rotation(places[group.tokens])
                held = Pages(*pages, group.slots, group.started)
                out[0, group.tokens] = mixer(x[0, group.tokens], turns, held, None, None)
            for i, piece in enumerate(out[0].split(step)):
                given[i].append(piece)
        for i, text in enumerate(texts):
            whole = mixer(text[None], rotation(torch.arange(lengths[i])[None]), None, None, None)[0]
            torch.testing.assert_close(torch.cat(given[i]), whole, rtol=1e-4, atol=1e-5)
    assert all(page[slot].isnan().all() for page in pages for slot in (0, 2))


def test_sequences_alike_go_on_together():
    slots = torch.tensor([7, 3, 5, 2, 9])
    groups = grouped([0, 1, 2, 2, 5, 6], [9, 4, 0, 3, 1], slots)
    found = [(group.tokens.tolist(), group.slots.tolist(), group.started) for group in groups]
    assert found == [([[0], [1]], [7, 3], True), ([[2, 3, 4]], [2], False), ([[5]], [9], False)]


def test_parameters_that_stay_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = make_mixer(config_of("gated_deltanet"), 1)
        shapes = state_shapes(config_of("gated_deltanet"))
    finally:
        torch.set_default_dtype(torch.float32)
    kept = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "a_proj.weight", "b_proj.weight"}
    assert shapes == (((4 + 2 + 2) * K, 2), (2, K, K))


def test_a_mixer_it_does_not_know():
    with pytest.raises(ValueError, match="linear_mixer 'hyena' is not one of gated_deltanet, gla"):
        make_mixer(config_of("hyena"), 1)
