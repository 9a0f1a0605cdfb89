"""The plan of a model, against the model itself; and the verb."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.cli import app, main
from jaxhybrid.families import hf_to_config
from jaxhybrid.model.blueprint import count_parameters
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.decode import initial_states
from jaxhybrid.model.mixers import LINEAR_MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.transformer import model_variables
from jaxhybrid.plan import serving, steps, surgery
from jaxhybrid.plan.planned import Planned
from jaxhybrid.plan.program import Request
from jaxhybrid.plan.recipe import recipe, teacher_pass_flops
from jaxhybrid.plan.roofline import HOP, links_seconds, roofline
from jaxhybrid.plan.suggest import meshes, ranked
from jaxhybrid.plan.surgery import OPEN
from jaxhybrid.plan.table import markdown, model_screen
from jaxhybrid.plan.topology import CHIPS, Topology
from jaxhybrid.plan.worker import figures
from jaxhybrid.settings.read import load_config, parse_config
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher
from tests.tiny import write_config

ROOT = Path(__file__).parents[2]
KEYS = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(KEYS))
    return write_config(tmp_path / "config.yaml", tmp_path / "teacher", select={"method": "kl_guided", "budget": 1})


@pytest.fixture
def plan_of(config_file):
    return lambda *overrides: Planned(load_config(config_file, overrides))


@pytest.mark.parametrize("folder", sorted((ROOT / "configs" / "teachers").iterdir()), ids=lambda path: path.name)
def test_published_sizes_are_read_as_a_teachers(folder):
    published = {  # parameters as their model cards count them, in billions
        "llama-3.2-3b-instruct": 3.21, "qwen2.5-1.5b-instruct": 1.54, "qwen2.5-3b-instruct": 3.09,
        "qwen2.5-7b-instruct": 7.62, "qwen2.5-32b-instruct": 32.76, "qwen2.5-72b-instruct": 72.71,
        "qwen3-1.7b": 1.72, "qwen3-8b": 8.19, "smollm2-135m-instruct": 0.1345,
    }  # fmt: skip
    config = hf_to_config(json.loads((folder / "config.json").read_text()))
    assert count_parameters(model_variables(config)) / 1e9 == pytest.approx(published[folder.name], rel=3e-3)


def test_what_a_linear_layer_takes_is_what_conversion_gives_it(plan_of):
    planned = plan_of("select.method=explicit", "select.layers=[2]", "select.budget=1")
    found = surgery.surgery(planned)
    assert found.layers == ("gated_deltanet", "gated_deltanet", FULL_ATTENTION, "gated_deltanet")
    teacher = make_teacher(vocab_size=320, tie_embeddings=True)
    student = convert(teacher, found.layers, GatedDeltaNetConfig(), jax.random.key(0))
    own, attention = student.params["mixers"]["gated_deltanet"], teacher.params["mixers"][FULL_ATTENTION]
    for name, copies in found.taken.items():
        part, leaf = name.split(".")
        np.testing.assert_array_equal(own[part][leaf][0], np.repeat(attention[part][leaf][0], copies, axis=-2))
    assert {"k_proj.kernel": 2, "v_proj.kernel": 2, "q_proj.kernel": 1}.items() <= found.taken.items()
    assert set(found.new) == {"A_log", "dt_bias", "a_proj.kernel", "b_proj.kernel", "g_proj.kernel", "o_norm.scale"}
    assert found.parameters["student"] == sum(x.size for x in jax.tree.leaves(student.params))


def test_of_experts_a_plan_names_the_parameters_that_a_token_meets(plan_of, config_file):
    keys = KEYS | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    dense = {**KEYS, "intermediate_size": 32}  # two experts of 16, without the router
    sizes = {}
    for name, own in (("mixture", keys), ("dense", dense)):
        (config_file.parent / "teacher" / "config.json").write_text(json.dumps(own))
        sizes[name] = surgery.surgery(plan_of()).parameters, teacher_pass_flops(plan_of()), model_screen(plan_of())
    (count, flops, screen), (dense_count, dense_flops, dense_screen) = sizes["mixture"], sizes["dense"]
    router_and_norms = 4 * (8 * 32 + 2 * 8)
    assert count["teacher, for a token"] == dense_count["teacher"] + router_and_norms
    assert count["teacher"] - count["teacher, for a token"] == 4 * 6 * 3 * 16 * 32
    assert flops == dense_flops + 2 * router_and_norms
    assert f"{count['teacher']:,} parameters, of which a token meets {count['teacher, for a token']:,}" in screen
    assert "meets" not in dense_screen


def test_what_is_left_behind_is_named(plan_of, config_file):
    keys = KEYS | {"model_type": "qwen2"}  # has biases
    (config_file.parent / "teacher" / "config.json").write_text(json.dumps(keys))
    with pytest.warns(UserWarning, match="not carried"):
        found = surgery.surgery(plan_of("mixer.qkv_bias=false"))
    assert found.left == ("k_proj.bias", "q_proj.bias", "v_proj.bias")
    assert set(found.layers) == {OPEN}  # the scores will tell


@pytest.mark.parametrize(
    "overrides",
    [
        ("mixer.expand_kv=false",),
        ("mixer.conv_size=4",),
        *((f"mixer.kind={kind}",) for kind in LINEAR_MIXERS),
        ("mixer.kind=window_attention", "mixer.window=40", "mixer.sinks=4"),
    ],
)
def test_bytes_of_a_sequence_are_those_of_the_decode_state(plan_of, overrides):
    planned = plan_of("dtype=bfloat16", *overrides)
    found = serving.serving(planned)
    for length in (1, 64):
        for config, ours in ((planned.hybrid, found.hybrid), (planned.teacher, found.teacher)):
            state = jax.eval_shape(lambda c=config, n=length: initial_states(c, 1, n, jnp.bfloat16))
            assert ours(length) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    before, there = found.smaller_from - 1, found.smaller_from
    assert found.hybrid(before) > found.teacher(before)
    assert found.hybrid(there) <= found.teacher(there)


def test_the_recipe_counts_every_candidate(plan_of):
    planned = plan_of(
        "score.tokens=8192", "score.evaluate_every=2", "score.stop_when_stable.window=2", "score.heldout_tokens=512"
    )
    found = recipe(planned)
    assert found["score"].steps == 4 * 16  # layers x steps of 8 rows of 64 tokens
    assert found["score"].fewest_steps == 4 * 6  # the first look is at the third evaluation
    assert found["score"].teacher_passes == 16 + 1
    assert found["align"].tokens == planned.config.align.tokens
    assert "score" not in recipe(plan_of("select.method=uniform"))
    assert recipe(plan_of("score.keep_teacher_states=false"))["score"].teacher_passes == 4 * 4 + 1


def exchange(kind, received, **links):
    found = {"kind": kind, "axes": ["fsdp"], "received": received, "times": 1, "gbps": 100, "link_gbps": 50, "side": 16}
    return found | links


def test_seconds_of_exchanges():
    assert links_seconds([exchange("gather", 5e9), exchange("scatter", 5e9)]) == pytest.approx(0.1)
    assert links_seconds([exchange("exchange", 5e9)]) == pytest.approx(0.05 * 16 / 4)
    assert links_seconds([exchange("neighbour", 5e9)]) == pytest.approx(0.1)  # one direction of the ring
    assert links_seconds([exchange("neighbour", 1, times=10)]) == pytest.approx(10 * HOP)
    assert links_seconds([exchange("reduce", 1, times=10)]) == pytest.approx(10 * HOP * 8)


def test_what_bounds_a_step():
    chip = CHIPS["v5p"]
    figures = {"flops": {"products": 459e12}, "moved": 2765e9, "exchanges": [exchange("gather", 50e9)]}
    line = roofline(figures, chip)
    assert (line.math, line.memory, line.links) == pytest.approx((1.0, 1.0, 0.5))
    assert (line.expected, line.bound) == (pytest.approx(2.0), "products")
    assert roofline(figures | {"moved": 3 * 2765e9}, chip).bound == "memory"
    gpu = {"flops": {"attention": 989e12}, "moved": 2 * 4800e9, "exchanges": []}  # at what was measured, not at half
    assert roofline(gpu, CHIPS["h200"]).bound == "memory"
    assert roofline(gpu | {"moved": 4800e9}, CHIPS["h200"]).bound == "products"
    halves = CHIPS["tpu7x"]  # figures are of a device, of which its chips have two
    assert roofline(figures | {"flops": {"products": 2307e12}}, halves).math == pytest.approx(2.0)


def test_suggestions_take_the_least_accumulation_that_fits(plan_of):
    topology, planned = Topology.parse("v5e:2x2"), plan_of()
    config = planned.config.model_copy(update={"distill": planned.config.distill.model_copy(update={"batch_size": 16})})

    def trace(request, _):  # a device's rows take 5 GiB each; accumulation costs time, and so do other axes
        settings, mesh = request.config.distill, request.config.mesh
        rows = settings.batch_size / settings.gradient_accumulation / mesh.fsdp
        seconds = (1 + settings.gradient_accumulation) * mesh.tensor * mesh.context
        flops = {"products": seconds * 197e12 / 2}
        return {"estimate": 5 * rows * 2**30, "held": 0, "flops": flops, "moved": 0, "exchanges": []}

    found = ranked(Request("distill", config, planned.keys, (1,)), topology, trace)
    assert next(iter(meshes(4))) == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    best = found[0]["settings"]
    assert (best["mesh.fsdp"], best["distill.gradient_accumulation"]) == (4, 2)  # 4 rows at once are 20 GiB of 15.75
    assert all(choice["gib"] <= 15.75 for choice in found)


def test_tables_are_aligned():
    assert markdown(["stage", "GiB"], [["align", "0.5"], ["distill", "12.5"]]).splitlines() == [
        "| stage   |  GiB |",
        "| ------- | ---: |",
        "| align   |  0.5 |",
        "| distill | 12.5 |",
    ]


# --- the verb


def run_verb(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["jaxhybrid", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, capsys.readouterr()


def test_the_model_alone_needs_no_compiler(monkeypatch, capsys, config_file):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/absent")
    code, said = run_verb(monkeypatch, capsys, config_file, "--model-only")
    assert code == 0
    assert "1 of 4 layers softmax, the others gated_deltanet" in said.out
    assert re.search(r"\| 0 to 3 \| open: kl_guided keeps 1", said.out)
    assert "k_proj.kernel (each head 2 times)" in said.out
    assert "softmax have" not in said.out
    _, said = run_verb(monkeypatch, capsys, config_file, "--model-only", "softmax.rope=false")
    assert "Layers that stay softmax have, from distillation on, no rotary embedding." in said.out
    code, said = run_verb(monkeypatch, capsys, config_file, "--model-only", "--json")
    assert json.loads(said.out)["model"]["layers"] == [OPEN] * 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "needs either --topology"),
        (("--model-only", "--topology", "v5p:4x4x4"), "needs either --topology"),
        (("--model-only", "--suggest", "--stage", "score"), "leave them out of --model-only"),
        (("--model-only", "--stage", "score"), "leave them out of --model-only"),
        (("--topology", "v5p:4x4x4", "--stage", "distil"), "--stage 'distil' is none of align"),
        (("--topology", "v9:4x4"), "'v9:4x4' is of no known kind"),
        (("--topology", "v5e:2x2"), "make tpu-compiler"),
        (("--topology", "h200:1", "teacher=nowhere"), "nowhere is neither a folder nor a hub id"),
    ],
)
def test_refusals(monkeypatch, capsys, config_file, arguments, told):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/absent")
    overrides = [x for x in arguments if "=" in x]
    options = [x for x in arguments if "=" not in x]
    code, said = run_verb(monkeypatch, capsys, config_file, *overrides, *options)
    assert code == 2
    assert told in said.err
    assert "Traceback" not in said.err


@pytest.fixture
def false_worker(monkeypatch, tmp_path):
    """Four choices are estimated to fit; the compiler takes the last. Gives what it was asked to compile."""
    peaks, asked = {1: 120.0, 2: 110.0, 4: 95.5, 8: 94.0}, []
    choices = [
        {"settings": {"mesh.fsdp": 64, "distill.gradient_accumulation": parts}, "milliseconds": 10.0 * parts, "gib": 90}
        for parts in peaks
    ]

    def answer(request, libtpu):
        if request["suggest"]:
            return {"choices": choices}
        asked.append(request["config"]["distill"]["gradient_accumulation"])
        given = dict.fromkeys(("parameters", "optimizer", "teacher", "batch"), 2**30)
        compiled = {"memory": {"peak_memory": peaks[asked[-1]] * 2**30}, "compile_cpu_seconds": 7.0}
        return {"given": given, "held": 2**30, "compiled": compiled}

    monkeypatch.setattr(steps, "in_worker", answer)
    monkeypatch.setattr(steps, "find_libtpu", lambda: Path(__file__))
    monkeypatch.setenv("JAXHYBRID_PLAN_CACHE", str(tmp_path / "plans"))
    return SimpleNamespace(choices=choices, asked=asked)


SUGGEST = "--topology", "v5p:4x4x4", "--suggest", "--stage", "distill"


def test_a_suggestion_is_the_first_that_the_compiler_takes(monkeypatch, capsys, config_file, false_worker):
    code, said = run_verb(monkeypatch, capsys, config_file, *SUGGEST)
    assert code == 0
    assert "distill: 80.0 ms a step, 95.00 GiB: mesh.fsdp=64 distill.gradient_accumulation=8" in said.out
    assert "distill: choice 3 of 4 that were estimated to fit takes 96.50 GiB and does not" in said.err
    assert false_worker.asked == [1, 2, 4, 8]
    code, said = run_verb(monkeypatch, capsys, config_file, *SUGGEST, "--json")
    assert json.loads(said.out)["topologies"]["v5p:4x4x4"]["distill"] == false_worker.choices[3] | {"gib": 95.0}
    assert false_worker.asked == [1, 2, 4, 8]  # the rest is kept


def test_where_nothing_fits_no_settings_are_suggested(monkeypatch, capsys, config_file, false_worker):
    del false_worker.choices[3]
    code, said = run_verb(monkeypatch, capsys, config_file, *SUGGEST)
    assert code == 0
    assert "distill: none, of all that were estimated to fit. Take a larger slice" in said.out
    assert false_worker.asked == [1, 2, 4]


@pytest.mark.parametrize("method", ["kl_guided", "uniform"])
def test_by_default_the_stages_are_planned_that_the_run_has(monkeypatch, capsys, config_file, false_worker, method):
    del false_worker.choices[:]
    code, said = run_verb(monkeypatch, capsys, config_file, f"select.method={method}", *SUGGEST[:3], "--json")
    assert code == 0, said.err
    scored = ["score"] if method == "kl_guided" else []
    assert list(json.loads(said.out)["topologies"]["v5p:4x4x4"]) == ["align", *scored, "distill", "finetune"]


def test_help_has_an_example():
    (command,) = (command for command in app.registered_commands if command.callback.__name__ == "plan")
    assert "--topology v5p:4x4x4" in command.callback.__doc__


def test_a_gpu_is_planned_by_an_estimate(monkeypatch, capsys, config_file, tmp_path):
    def here(request, libtpu):
        assert libtpu is None
        config, kept = parse_config(request["config"]), tuple(request["softmax_layers"])
        wanted = Request(request["stage"], config, request["teacher"], kept)
        return figures(wanted, Topology.parse(request["topology"]))

    monkeypatch.setattr(steps, "in_worker", here)
    monkeypatch.setenv("JAXHYBRID_PLAN_CACHE", str(tmp_path / "plans"))
    given = "--topology", "h200:2", "--stage", "finetune"
    code, said = run_verb(monkeypatch, capsys, config_file, *given)
    assert code == 0, said.err
    assert "h200:2, 2 chips, mesh fsdp: 2. Memory in GiB of a device, an estimate" in said.out
    row = re.search(r"^\| finetune \|.* yes ", said.out, re.MULTILINE)
    assert row
    code, said = run_verb(monkeypatch, capsys, config_file, "finetune.batch_size=3", *given)
    assert code == 2
    assert "batch_size=3 does not divide over 1 microbatches x 2 devices" in said.err
