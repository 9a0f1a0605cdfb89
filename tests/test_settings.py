"""Settings: what is read, what is refused and with which words, what counts as a difference."""

import dataclasses
from pathlib import Path

import pytest

from jaxhybrid.assembly import student_config
from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import ExpertsConfig, ModelConfig, SoftmaxConfig, WindowConfig
from jaxhybrid.model.mixers import STUDENT_MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.settings.compare import UPSTREAM, _binding, differences, fingerprint
from jaxhybrid.settings.fields import describe
from jaxhybrid.settings.mixer import MixerSettings
from jaxhybrid.settings.read import load_config, to_yaml
from jaxhybrid.settings.run import validate_against

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = "name: a\nteacher: t\ndata:\n  train: pydoc\n"
LLAMA = ModelConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=8, norm_eps=1e-5, max_position_embeddings=4096,
)  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def load_text(*overrides, text=MINIMAL):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load_text


def test_defaults_are_the_papers(load):
    config = load()
    assert (config.align.tokens, config.align.sequence_length, config.align.batch_size) == (100_000_000, 512, 96)
    assert (config.align.learning_rate, config.align.final_learning_rate, config.align.schedule) == (
        1e-3,
        1e-5,
        "cosine",
    )
    for stage, tokens in ((config.score, 200_000_000), (config.distill, 600_000_000)):
        assert (stage.tokens, stage.sequence_length, stage.batch_size) == (tokens, 4096, 32)
        assert (stage.learning_rate, stage.mixer_learning_rate, stage.schedule) == (7e-6, 1e-4, "constant")
    assert config.distill.steps == 4577
    finetune = config.finetune
    assert (finetune.tokens, finetune.sequence_length, finetune.batch_size) == (100_000_000, 16384, 96)
    assert finetune.learning_rate == finetune.mixer_learning_rate == 1e-5
    for stage in (config.align, config.score, config.distill, finetune):
        assert (stage.betas, stage.clip_norm, stage.weight_decay) == ((0.9, 0.95), 1.0, 0.0)
    assert config.run_dir == "runs/a"
    assert config.data.train == ("pydoc",)


def test_the_layers_are_chosen_by_greedy_addition_which_scores_none(load):
    config = load()
    assert (config.select.method, config.select.needs) == ("greedy_kl", {"student"})


def test_the_mixer_section_is_the_models_own():
    declared = {f.name for mixer in STUDENT_MIXERS.values() for f in dataclasses.fields(mixer.Config)}
    assert set(MixerSettings.model_fields) - {"kind"} == declared
    assert MixerSettings().to_model() == GatedDeltaNetConfig()
    assert MixerSettings(conv_size=4, rope=True).to_model() == GatedDeltaNetConfig(conv_size=4, rope=True)
    assert MixerSettings(kind="gla", decay_rank=8).to_model() == GLAConfig(decay_rank=8)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("align.learning_rate=1e-4", "align.learning_rate", 1e-4),
        ("align.learning_rate=2", "align.learning_rate", 2.0),
        ("align.tokens=10_000_000", "align.tokens", 10_000_000),
        ("align.clip_norm=", "align.clip_norm", None),
        ("align.clip_norm=null", "align.clip_norm", None),
        ("align.betas=[0.8, 0.9]", "align.betas", (0.8, 0.9)),
        ("align.remat=false", "align.remat", "none"),
        ("distill.remat=offload", "distill.remat", "offload"),
        ("select.budget=4", "select.budget", 4),
        ("select.budget=0.5", "select.budget", 0.5),
        ("data.train=*.parquet", "data.train", ("*.parquet",)),
        ("data.train=/text/**/*.jsonl.zst", "data.train", ("/text/**/*.jsonl.zst",)),
        ("data.train=[a.txt, pydoc]", "data.train", ("a.txt", "pydoc")),
        ("data.train=hub:some/set:config:split", "data.train", ("hub:some/set:config:split",)),
        ("score.stop_when_stable={window: 5}", "score.stop_when_stable.window", 5),
        ("score.stop_when_stable.jaccard=0.9", "score.stop_when_stable.jaccard", 0.9),
        ("mixer.qkv_bias=true", "mixer.qkv_bias", True),
        ("evaluate.recall.pairs=[3]", "evaluate.recall.pairs", (3,)),
    ],
)
def test_overrides(load, override, key, value):
    found = load(override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_an_override_changes_one_section_of_those_that_share_an_anchor(load):
    stages = "distill: &rows {batch_size: 8}\nfinetune: *rows\n"
    config = load("finetune.batch_size=4", text=MINIMAL + stages)
    assert (config.distill.batch_size, config.finetune.batch_size) == (8, 4)


def test_later_overrides_win(load):
    assert load("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_load_and_come_back_from_their_resolved_form(path, tmp_path):
    config = load_config(path, ["data.train=pydoc"] if "smollm2" in path.stem else [])
    assert config.name == path.stem
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    again = load_config(resolved)
    assert again == config
    assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sead=1"], "Unknown setting 'sead'. Did you mean 'seed'?"),
        (["align.tokns=1"], "Unknown setting 'align.tokns'. Did you mean 'align.tokens'?"),
        (["shuffle_buffer=1"], "Unknown setting 'shuffle_buffer'. Did you mean 'data.shuffle_buffer'?"),
        (["score.stop_when_stable={windw: 3}"], "Did you mean 'score.stop_when_stable.window'?"),
        (
            ["score.stop_when_stable={window: 3, window_tokens: 100_000_000}"],
            "score.stop_when_stable: window_tokens is 100000000 and window 3; give one of them.",
        ),
        (
            ["score.stop_when_stable={window_tokens: 20_000_000}"],
            "score: stop_when_stable.window_tokens 20,000,000 must hold two evaluations, 26,214,400 tokens",
        ),
        (
            ["score.stop_when_stable={}", "score.tokens=100_000_000"],
            "fewer than the 100,000,000 tokens of a candidate.",
        ),
        (["zzz.qqq=1"], "Unknown setting 'zzz'. `jaxhybrid settings` lists every setting."),
        (["align.learning_rate=fast"], "align.learning_rate is 'fast' (str); it should be a valid number."),
        (["align.learning_rate=.inf"], "align.learning_rate is inf (float); it should be a finite number."),
        (["align.tokens=1e6"], "align.tokens is 1000000.0 (float); it should be a valid integer."),
        (["align.tokens='5'"], "align.tokens is '5' (str); it should be a valid integer."),
        (["align.remat=1"], "align.remat is 1 (int); it should be 'none', 'block', 'mlp', 'dots' or 'offload'."),
        (["mesh.sums=float16"], "mesh.sums is 'float16' (str); it should be 'bfloat16' or 'float32'."),
        (["align.betas=[0.9]"], "align.betas[1] must be given."),
        (["align.betas=[0.9, 2]"], "align.betas[1] is 2 (int); it should be less than 1."),
        (["align.schedule=step"], "align.schedule is 'step' (str); it should be 'constant', 'cosine' or 'linear'."),
        (["align=5"], "align is 5, not a section of `key: value` lines."),
        (["data.train="], "data.train is None (NoneType); it should be a list."),
        (
            ["select.budget=25%"],
            "select.budget is '25%' (str); it should be a valid integer; or it should be a valid number.",
        ),
        (["select.budget=1.0"], "select.budget: 1.0 is neither a number of layers nor a share between 0 and 1."),
        (["select.budget=-1"], "select.budget: -1 is neither a number of layers nor a share between 0 and 1."),
        (
            ["score.budgets=[0.3, -2]"],
            "score.budgets[1]: -2 is neither a number of layers nor a share between 0 and 1.",
        ),
        (["name=a/b"], "name is 'a/b' (str); String should match pattern"),
        (["export.max_shard=5 GB"], "export.max_shard: '5 GB' is no size such as 5GB or 500MB."),
        (["mixer.kind=mamba"], "mixer.kind is 'mamba' (str); it should be 'gated_deltanet', 'gla', 'deltanet', "),
        (["mixer.kind=gla", "mixer.conv_size=4"], "mixer: conv_size is not a setting of gla; leave it out"),
        (["mixer.conv_size=1"], "mixer: conv_size=1: use 0 for no convolution"),
        (["mixer.kind=mamba2", "mixer.ssm_conv_size=1"], "mixer: ssm_conv_size=1: use 0 for no convolution"),
        (["mixer.kind=deltanet", "mixer.decay_init=slow"], "mixer: decay_init='slow': deltanet has no decay"),
        (["mixer.kind=kimi_delta", "mixer.gate_init=value"], "mixer: gate_init='value': the gate of kimi_delta is of"),
        (["mixer.kind=rwkv7", "mixer.gate_init=value"], "mixer: gate_init='value': the gate of rwkv7 is of low rank"),
        (["mixer.kind=rwkv7", "mixer.expand_kv=false"], "mixer: expand_kv=False: rwkv7 has one query a state"),
        (
            ["mixer.kind=window_attention", "mixer.rope=true"],
            "mixer: rope is not a setting of window_attention; leave it",
        ),
        (["mixer.kind=window_attention", "mixer.window=0"], "mixer: window=0: a token sees itself at least; use 1 or"),
        (["mixer.kind=window_attention", "mixer.sinks=-1"], "mixer: sinks=-1: use 0 for no sinks, or how many tokens"),
        (["mixer.kind=rwkv6", "mixer.low_rank=0"], "mixer: low_rank=0: must be at least 1, or null"),
        (
            ["mixer.kind=fixed_decay", "mixer.form=s4"],
            "mixer.form is 's4' (str); it should be 'lightning' or 'retnet'.",
        ),
        (
            ["align.batch_size=7", "align.gradient_accumulation=2"],
            "align: batch_size 7 is not a multiple of gradient_accumulation 2.",
        ),
        (["align.tokens=10"], "align: tokens 10 are less than one step: batch_size 96 x sequence_length 512 = 49,152."),
        (
            ["align.warmup_steps=2034"],
            "align: warmup_steps 2034 leave nothing of the 2034 steps in 100,000,000 tokens.",
        ),
        (
            ["align.unroll=true", "align.offload=[teacher]"],
            "align: unroll reads all layers' weights at once, offload ['teacher'] layer by layer; drop one of them.",
        ),
        (["score.unroll=true"], "score: unroll true: one program serves every candidate, so layers are a loop; drop"),
        (["align.final_learning_rate=1"], "align: final_learning_rate 1.0 is above learning_rate 0.001."),
        (
            ["distill.schedule=linear", "distill.final_mixer_learning_rate=1"],
            "distill: final_mixer_learning_rate 1.0 is above mixer_learning_rate 0.0001.",
        ),
        (["mesh.data=-1"], "mesh: data and fsdp are both -1; only one axis can take the rest of the devices."),
        (["run_dir=gs://bucket/run"], "run_dir: gs://bucket/run names object storage"),
        (["export.folder=s3://bucket/out"], "export.folder: s3://bucket/out names object storage"),
        (["mesh.tensor=-1"], "mesh: tensor is -1; give a positive number."),
        (["mesh.data=0"], "mesh: data is 0; give a positive number, or -1 for the rest of the devices."),
        (["select.method=explicit"], "select: layers is None with method 'explicit'"),
        (["select.method=greedy"], "select.method is 'greedy' (str); it should be 'activation_mse', 'alignment_loss'"),
        (["select.greedy_kl.rescored=2"], "Unknown setting 'select.greedy_kl.rescored'. Did you mean"),
        (["select.greedy_kl.rescore=0"], "select.greedy_kl.rescore is 0 (int); it should be greater than 0."),
        (
            ["select.measure.recall=1.5"],
            "select.measure.recall is 1.5 (float); it should be less than or equal to 1.",
        ),
        (
            ["select.method=removal", "select.removal.first_tokens=65_536"],
            "select: removal.first_tokens 65,536 are more than the 32,768 of measure.tokens.",
        ),
        (
            [
                "select.method=average_rank",
                "select.average_rank.of=[removal, single_kl]",
                "select.removal.first_tokens=65_536",
            ],
            "select: removal.first_tokens 65,536 are more than the 32,768 of measure.tokens.",
        ),
        (
            ["select.method=average_rank", "select.average_rank.of=[cosine, single_kl]", "select.measure.recall=0.5"],
            "select: measure.recall is 0.5, but method 'cosine' counts no answers.",
        ),
        (
            ["select.measure.tokens=3_000_000"],
            "select.measure.tokens 3,000,000 are more than the 2,000,000 that data.heldout_tokens takes out of train",
        ),
        (["select.layers=[1]"], "select: layers is (1,) with method 'greedy_kl'"),
        (["select.method=explicit", "select.layers=[1, 1]"], "select: layers [1, 1] must be different ones"),
        (
            ["select.method=explicit", "select.layers=[1, 2]", "select.budget=3"],
            "select: layers [1, 2] must be different ones and as many as budget 3.",
        ),
        (
            ["data.min_document_tokens=9", "data.max_document_tokens=8"],
            "data: min_document_tokens 9 is above max_document_tokens 8; no text would be left.",
        ),
        (
            ["finetune.min_document_tokens=9", "data.max_document_tokens=8"],
            "finetune.min_document_tokens 9 is above max_document_tokens 8; no text would be left.",
        ),
        (["data.heldout=pydoc"], "data: train and heldout both name ['pydoc']; held-out text must be other text."),
        (["evaluate.heldout_tokens=3_000_000"], "evaluate.heldout_tokens 3,000,000 are more than the 2,000,000 that"),
        (["data.train.x=3"], "Override 'data.train.x=3': data.train is 'pydoc', not a section."),
        (["seed"], "Override 'seed' is not of the form key=value, for example distill.tokens=1_000_000."),
        (["=1"], "Override '=1' is not of the form key=value"),
        (["seed=[1"], "Cannot read override 'seed=[1': while parsing"),
    ],
)
def test_what_is_refused(load, overrides, message):
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    assert message in str(error.value)


def test_everything_that_is_wrong_is_said_at_once(load):
    with pytest.raises(ConfigError) as error:
        load("sead=1", "align.tokens=x", "export.dtype=int8")
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is a NoneType, not `key: value` lines"),
        ("- a\n", "is a list, not `key: value` lines"),
        ("a: [\n", "Cannot read config"),
        (MINIMAL + "seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("name: a\nteacher: t\n", "data must be given"),
        ("name: a\nteacher: t\ndata: {}\n", "data.train must be given: training text"),
        ("teacher: t\ndata: {train: pydoc}\n", "name must be given"),
        ("name: a\nteacher: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_refused(load, text, message):
    with pytest.raises(ConfigError) as error:
        load(text=text)
    assert message in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read config .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_settings_cannot_be_changed(load):
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 1


@pytest.mark.parametrize(
    "override",
    [
        "name=b",
        "run_dir=elsewhere",
        "mesh.fsdp=4",
        "align.log_every=1",
        "distill.checkpoint_every=1",
        "distill.remat=false",
        "distill.gradient_accumulation=2",
        "score.kl_chunk=64",
        "data.cache_dir=/tmp/x",
        "evaluate.recall.samples=3",
        "export.dtype=float32",
    ],
)
def test_what_does_not_affect_results_is_no_difference(load, override):
    assert load(override) != load()
    assert differences(load(), load(override)) == []
    assert fingerprint(load()) == fingerprint(load(override))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", ["seed: 0 -> 1"]),
        ("distill.tokens=500_000_000", ["distill.tokens: 600_000_000 -> 500_000_000"]),
        ("data.train=[a.txt, b.txt]", ["data.train: [pydoc] -> [a.txt, b.txt]"]),
        ("mixer.qkv_bias=false", ["mixer.qkv_bias: null -> false"]),
        (
            "score.stop_when_stable={window: 4}",
            [
                f"score.stop_when_stable.{rule}"
                for rule in ("window: null -> 4", "jaccard: null -> 1.0", "every: null -> 1")
            ],
        ),
        (
            "score.stop_when_stable={}",
            [
                "score.stop_when_stable.window_tokens: null -> 100_000_000",
                "score.stop_when_stable.jaccard: null -> 1.0",
                "score.stop_when_stable.every: null -> 1",
            ],
        ),
        ("select.method=uniform", ["select.method: greedy_kl -> uniform"]),
    ],
)
def test_differences_are_named(load, override, expected):
    assert differences(load(), load(override)) == expected
    assert fingerprint(load()) != fingerprint(load(override))


def test_settings_of_an_earlier_version_mean_what_they_meant(load):
    """A config as a run folder of a version without the newer settings holds it."""
    earlier = MINIMAL.replace("train: pydoc", "train: pydoc\n  max_document_tokens: null") + (
        "score: {stop_when_stable: {window: 3, jaccard: 1.0}}\n"
        "select: {method: kl_guided, budget: 0.25, layers: null, seed: 0}\n"
        "evaluate: {recall: {pairs: [10, 50], samples: 500}}\n"
    )
    config = load(text=earlier)
    assert (config.score.stop_when_stable.window, config.score.stop_when_stable.window_tokens) == (3, None)
    assert (config.select.rank_by, config.select.uniform) == ("heldout", "last")
    assert config.data.separate_documents
    assert config.data.min_document_tokens is config.finetune.min_document_tokens is None
    assert config.evaluate.recall.filler == (0,)
    scored = load("select.method=kl_guided", "score.stop_when_stable={window: 3}")
    assert differences(config, scored) == []  # it names its method, which is not today's default


def test_settings_of_another_method_of_selection_do_not_count(load):
    scored = load("select.method=kl_guided")
    own = ("select.greedy_kl.swaps=true", "select.measure.tokens=1024", "select.removal.rescore=5")
    others = load("select.method=kl_guided", *own)
    assert fingerprint(others) == fingerprint(scored)
    assert differences(scored, others) == []
    greedy = [load("select.method=greedy_kl", *more) for more in ((), ("select.removal.rescore=5",))]
    assert fingerprint(greedy[0]) == fingerprint(greedy[1]) != fingerprint(scored)
    assert differences(scored, greedy[0]) == ["select.method: kl_guided -> greedy_kl"]
    less = load("select.method=greedy_kl", "select.measure.tokens=1024", "select.measure.kl_chunk=64")
    assert differences(greedy[0], less) == ["select.measure.tokens: 32_768 -> 1_024"]
    mean = ("select.method=average_rank", "select.average_rank.of=[removal, kl_guided]")
    asked = [load(*mean, *more) for more in ((), ("select.removal.rescore=5",), ("select.greedy_kl.rescore=5",))]
    assert differences(asked[0], asked[1]) == ["select.removal.rescore: 3 -> 5"]
    assert fingerprint(asked[0]) == fingerprint(asked[2]) != fingerprint(asked[1])
    assert (asked[0].select.reads, asked[0].select.needs) == (
        ("measure", "average_rank", "removal"),
        {"student", "scores"},
    )
    assert load(text=to_yaml(asked[1])) == asked[1]
    keys = {f"select.{name}" for name in ("method", "budget", "layers", "seed", "uniform", "rank_by")}
    assert (
        _binding(scored, {"select"}).keys() == keys
    )  # as before methods had sections: fingerprints are what they were


def test_a_stage_depends_on_what_comes_before_it_alone(load):
    ours, theirs = load(), load("finetune.learning_rate=1e-4", "distill.learning_rate=1e-4")
    assert differences(ours, theirs, UPSTREAM["score"]) == []
    assert fingerprint(ours, UPSTREAM["score"]) == fingerprint(theirs, UPSTREAM["score"])
    assert differences(ours, theirs, UPSTREAM["distill"]) == ["distill.learning_rate: 7e-06 -> 0.0001"]
    assert len(differences(ours, theirs, UPSTREAM["finetune"])) == 2
    theirs = load("softmax.rope=false", "softmax.length_scale=500")
    assert differences(ours, theirs, UPSTREAM["select"]) == []
    changed = ["softmax.rope: true -> false", "softmax.length_scale: null -> 500.0"]
    assert differences(load(), theirs, UPSTREAM["distill"]) == changed


def test_describe_lists_every_setting(load):
    text = describe()

    def keys(tree, prefix=""):
        for key, value in tree.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    lines = text.splitlines()
    for key in keys(load("score.stop_when_stable={}", "align.calibrate={}").model_dump()):
        (index,) = [i for i, line in enumerate(lines) if line.startswith(f"  {key}  [")]
        assert len(lines[index + 1].strip()) > 5, key  # its meaning
    assert "  data.train  [list of text = required]" in lines
    assert "  align.clip_norm  [float|null = 1.0]" in lines
    assert "  distill.tokens  [int = 600_000_000]" in lines
    assert "  align.schedule  [constant|cosine|linear = cosine]" in lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["select.budget=5"], "select.budget 5 keeps 5 layers, but the model has 4. Choose at most 4."),
        (["select.budget=0.1"], "select.budget 0.1 keeps no softmax layer of 4."),
        (["score.budgets=[9]"], "score.budgets 9 keeps 9 layers, but the model has 4."),
        (
            ["select.method=explicit", "select.layers=[1, 4]"],
            "select.layers names [4]; the model's layers are 0 to 3.",
        ),
        (
            ["select.method=supernet", "select.supernet.sequence_length=8192"],
            "select.supernet.sequence_length 8192 is beyond the 4096 tokens of context",
        ),
        (["distill.sequence_length=8192"], "distill.sequence_length 8192 is beyond the 4096 tokens of context"),
    ],
)
def test_what_the_teacher_rules_out(load, overrides, message):
    validate_against(load("select.budget=4"), LLAMA)
    with pytest.raises(ConfigError) as error:
        validate_against(load(*overrides), LLAMA)
    assert message in str(error.value)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_teacher_in_float8_has_no_experts(load, stage):
    experts = dataclasses.replace(LLAMA, experts=ExpertsConfig(count=4, active=2, width=16, normalise=True))
    asked = load(f"{stage}.float8_teacher=true")
    validate_against(asked, LLAMA)
    validate_against(load(), experts)
    with pytest.raises(ConfigError, match=rf"{stage}\.float8_teacher: .* mixtures of experts"):
        validate_against(asked, experts)
    assert differences(load(), asked) == [f"{stage}.float8_teacher: false -> true"]


def test_settings_of_kept_layers_are_of_the_hybrid(load):
    """What comes before it works on the teacher's attention."""
    config, teacher = load("softmax.rope=false", "softmax.length_scale=500", "mixer.rope=true"), LLAMA
    assert student_config(config, teacher, ()).softmax == SoftmaxConfig()
    assert student_config(config, teacher, (1,)).softmax == SoftmaxConfig(rope=False, length_scale=500.0)
    sliding = dataclasses.replace(teacher, window=WindowConfig(64, (0, 2)))
    with pytest.raises(ConfigError, match=r"length_scale 500 is for layers .* see 64 at most"):
        validate_against(config, sliding)
    with pytest.raises(ConfigError, match=r"export.format native: no architecture .* softmax\.length_scale"):
        load("softmax.length_scale=500", "export.format=native")
    with pytest.raises(ConfigError, match=r"softmax\.length_scale"):
        load("softmax.length_scale=1")
