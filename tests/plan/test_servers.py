"""What `check` says of an export: which server loads it, why another does not, and what a sequence takes."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from jaxhybrid.cli import app
from jaxhybrid.errors import ConfigError
from jaxhybrid.export.folder import export
from jaxhybrid.model.config import FULL_ATTENTION, ExpertsConfig, SoftmaxConfig
from jaxhybrid.plan.servers import block_tokens, check, server_facts
from jaxhybrid.plan.serving import serving_of
from tests.export.students import (
    CASES,
    GRANITE,
    GRANITE_CASES,
    LIN,
    OTHER_MIXERS,
    QWEN3_5,
    SOFT,
    WINDOW_CASES,
    make_student,
)

PERIOD_2 = QWEN3_5 | {"num_layers": 4, "layer_types": (LIN, SOFT, LIN, SOFT)}


@pytest.fixture
def exported(tmp_path):
    def write(format="auto", **changes):
        with pytest.warns(UserWarning, match="No tokenizer"):
            return export(make_student("", least_scale=0.5, **changes), tmp_path / "out", format=format)

    return write


def loaded(found):
    return {one["server"]: one["loads"] for one in found["servers"]}


def test_a_native_export_with_an_interval(exported):
    found = check(exported(**PERIOD_2))
    assert (found["form"], found["interval"], found["why_not_native"]) == ("qwen3_5_text", 2, "")
    assert loaded(found) == {
        "transformers": True,
        "vLLM": True,
        "SGLang": True,
        "llama.cpp": True,
        "TGI": None,
        "tpu-inference": None,
    }
    (vllm,) = (one for one in found["servers"] if one["server"] == "vLLM")
    assert "gdn_prefill_backend" in vllm["change"][0]  # heads of 16


def test_a_list_of_layers_that_a_server_does_not_read(exported):
    found = check(exported(**QWEN3_5 | {"num_layers": 4, "layer_types": (SOFT, LIN, LIN, SOFT)}))
    assert loaded(found) == {
        "transformers": True,
        "vLLM": True,
        "SGLang": False,
        "llama.cpp": True,
        "TGI": None,
        "tpu-inference": None,
    }
    (sglang,) = (one for one in found["servers"] if one["server"] == "SGLang")
    assert "softmax in 0, 3" in sglang["why"]
    assert "select.method=uniform select.uniform=last" in sglang["change"][0]


@pytest.mark.parametrize(
    ("changes", "llama_cpp", "why"),
    [
        ({}, False, "it has no rotary embedding in a hybrid"),
        ({"softmax": SoftmaxConfig(rope=False)}, True, "convert_hf_to_gguf.py"),
        (GRANITE_CASES["granite_everything"], False, "it has no biases in Mamba-2 layers"),
    ],
)
def test_a_native_export_with_mamba2(exported, changes, llama_cpp, why):
    found = check(exported(**GRANITE | changes))
    assert (found["form"], found["why_not_native"]) == ("granitemoehybrid", "")
    assert loaded(found) == {
        "transformers": True,
        "vLLM": True,
        "SGLang": None,
        "llama.cpp": llama_cpp,
        "TGI": None,
        "tpu-inference": None,
    }
    starts = {one["server"]: one["from"] for one in found["servers"]}
    assert (starts["transformers"], starts["vLLM"]) == ("5.23", "0.33")
    (cpp,) = (one for one in found["servers"] if one["server"] == "llama.cpp")
    assert why in cpp["why"]


@pytest.mark.parametrize(
    ("case", "vllm", "why"),
    [("windows_qwen2", None, "max_window_layers"), ("windows_olmo3", True, "the window of every layer by layer_types")],
)
def test_a_native_export_with_windows(exported, case, vllm, why):
    found = check(exported(**WINDOW_CASES[case]))
    assert (found["form"], found["why_not_native"]) == (case.removeprefix("windows_"), "")
    assert loaded(found) == {
        "transformers": True,
        "vLLM": vllm,
        "SGLang": None,
        "llama.cpp": None,
        "TGI": None,
        "tpu-inference": None,
    }
    assert why in found["servers"][1]["why"]
    assert "was not seen" in found["servers"][2]["why"]


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (CASES["qwen3"], "mixer.qk_norm=false"),
        (PERIOD_2, "--format native"),
        (GRANITE | {"mixer": replace(GRANITE["mixer"], head_norm=False)}, "mixer.head_norm=true"),
    ],
)
def test_an_export_with_its_own_code(exported, changes, remedy):
    found = check(exported("remote-code", **changes))
    assert [server for server, loads in loaded(found).items() if loads] == ["transformers", "vLLM"]
    assert set(loaded(found).values()) == {True, False}
    _, vllm, sglang, *_ = found["servers"]
    assert "plugins/vllm" in vllm["why"]
    assert remedy in found["why_not_native"] + sglang["change"][0]


def test_an_export_with_one_kind_of_layers(exported):
    found = check(exported("remote-code", layer_types=(LIN, LIN)))
    assert [server for server, loads in loaded(found).items() if loads] == ["transformers"]
    assert "all are gated_deltanet here" in found["servers"][1]["why"]


def test_an_export_with_what_a_server_lacks(exported):
    found = check(
        exported("remote-code", **OTHER_MIXERS["window_attention"] | {"softmax": SoftmaxConfig(length_scale=64.0)})
    )
    assert [server for server, loads in loaded(found).items() if loads] == ["transformers"]
    assert "it has no mixer of sliding windows, queries scaled by length" in found["servers"][1]["why"]


def test_an_export_with_experts(exported):
    found = check(exported(family="mixtral", experts=ExpertsConfig(4, 2, 128, normalise=True)))
    assert [server for server, loads in loaded(found).items() if loads] == ["transformers"]
    assert "it has no mixtures of experts" in found["servers"][1]["why"]
    assert "mixture of experts" in found["why_not_native"]


def test_the_setting_it_names_gives_an_interval():
    """`select.method=uniform` with `select.uniform=last`, for every number of equal groups."""
    from jaxhybrid.families.native_qwen3_5 import attention_interval
    from jaxhybrid.selection.choice import Given
    from jaxhybrid.selection.methods.uniform import choose
    from jaxhybrid.settings.select import SelectConfig

    config = make_student("", **QWEN3_5).config
    for depth, count in ((28, 7), (24, 6), (36, 12), (36, 4), (28, 14)):
        layers = choose(Given(depth, SelectConfig(uniform="last")), count).layers
        types = tuple(FULL_ATTENTION if layer in layers else LIN for layer in range(depth))
        assert attention_interval(replace(config, num_layers=depth, layer_types=types)) == depth // count


def test_bytes_of_a_sequence(exported):
    """By hand: heads of 16, 2 K/V heads in bfloat16; 4 float32 states of 16 x 16, and 3 inputs of 3 x 64 channels."""
    sequence = check(exported(**PERIOD_2))["sequence"]
    token, state = 2 * 2 * 16 * 2, 4 * 4 * 16 * 16 + 3 * 3 * 64 * 2
    assert sequence["kv_bytes_per_token_and_softmax_layer"] == token
    assert sequence["state_bytes_per_linear_layer"] == state
    assert sequence["sequences"][0] == {
        "tokens": 1024,
        "hybrid_bytes": 2 * 1024 * token + 2 * state,
        "teacher_bytes": 4 * 1024 * token,
    }
    block = sequence["kv_block_tokens_of_a_state"]
    assert block % 16 == 0
    assert (block - 16) * token < state <= block * token


def test_block_of_softmax_alone():
    config = make_student("", layer_types=(SOFT, SOFT), mixer=None).config
    assert block_tokens(serving_of(config, "bfloat16")) == 0


def test_the_command(exported, tmp_path):
    folder = exported(**PERIOD_2)
    printed = CliRunner().invoke(app, ["check", str(folder)])
    assert printed.exit_code == 0
    for name in (*server_facts(), "https://github.com/vllm-project/vllm/pull/50210", "131,072"):
        assert name in printed.output
    assert json.loads(CliRunner().invoke(app, ["check", str(folder), "--json"]).output) == check(folder)
    with pytest.raises(ConfigError, match="is not an exported folder"):
        check(tmp_path)
