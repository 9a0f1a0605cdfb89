"""Choices side by side, published ones among them."""

import json
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from jaxhybrid.assembly import RunModels
from jaxhybrid.cli import app
from jaxhybrid.selection.choice import Choice, ranked
from jaxhybrid.selection.compare import PUBLISHED, Listed, comparison, of_choice, published
from jaxhybrid.selection.methods import select_layers
from jaxhybrid.selection.methods.smart import spaced
from jaxhybrid.settings.budget import layers_in_budget

# By held-out KL 8 is best and 14 next; by training KL the first layers are.
HELDOUT = {8: 0.1, 14: 0.2}


def test_published_lists_are_of_layers_that_the_teachers_have():
    for paper in json.loads(PUBLISHED.read_text()):
        assert paper["source"]
        for layers in [*paper["rankings"].values(), *paper["sets"].values()]:
            assert len(set(layers)) == len(layers)
            assert set(layers) <= set(range(paper["depth"]))
        for name, layers in paper["sets"].items():
            assert layers == sorted(layers)
            assert f"{len(layers)} layers" in name


def test_published_spacings_are_what_our_methods_give():
    """SMART with the most sensitivity where the lists have layers, uniform by either rule."""
    lists = {one.name: one.kept for depth in (28, 36) for one in published(depth)}
    for teacher, depth, by in (("Qwen2.5-3B-Instruct", 36, "first"), ("Llama-3.2-3B-Instruct", 28, "last")):
        for count in (layers_in_budget(share, depth) for share in (0.125, 0.25)):
            assert select_layers("uniform", depth, count, uniform_by=by) == lists[f"{teacher}: uniform, {count} layers"]
            if smart := lists.get(f"{teacher}: SMART, {count} layers"):
                assert spaced([float(layer in smart) for layer in range(depth)], count) == smart


@pytest.mark.parametrize(("depth", "count"), [(9, 3), (10, 4), (11, 5), (8, 1), (4, 4)])
def test_smart_is_the_best_of_all_such_sets(depth, count):
    sensitivity = [(layer * 37 % 11) + 0.01 * layer for layer in range(depth)]
    width = depth // count
    if count == 1:
        assert spaced(sensitivity, 1) == (max(range(depth), key=sensitivity.__getitem__),)
        return
    first = max(range(width), key=sensitivity.__getitem__)
    last = max(range(depth - width, depth), key=sensitivity.__getitem__)
    mean = (last - first) / (count - 1)
    sets = [
        layers
        for layers in combinations(range(depth), count)
        if (layers[0], layers[-1]) == (first, last) and all(abs(b - a - mean) < 1 for a, b in pairwise(layers))
    ]
    assert spaced(sensitivity, count) == max(sets, key=lambda layers: sum(sensitivity[i] for i in layers))


def test_overlap_and_correlation_by_hand():
    a, b = Listed("a", "", order=(0, 1, 2, 3)), Listed("b", "", order=(1, 0, 2, 3))
    short, alone = Listed("short", "", order=(3,)), Listed("alone", "", kept=(0, 3))
    found = comparison([a, b, short, alone], 4, 2)
    pairs = {(pair["a"], pair["b"]): (pair["jaccard"], pair["correlation"]) for pair in found["pairs"]}
    assert pairs["a", "b"] == (1.0, pytest.approx(1 - 6 * 2 / (4 * 15)))
    assert pairs["a", "alone"] == (pytest.approx(1 / 3), None)
    # Ranks 1 2 3 4 against 3 3 3 1: layers that a list leaves out share the last place.
    assert pairs["a", "short"] == (0.0, pytest.approx(-3 / 15**0.5, abs=1e-9))
    # Of six sets of 2 of 4, one is the same, four share a layer, one none.
    assert found["jaccard_of_random_sets"] == pytest.approx((1 + 4 / 3) / 6)


def test_a_ranking_is_one_only_where_every_count_has_its_layers():
    assert of_choice("m", "", ranked({0: 1.0, 1: 2.0, 2: 0.0}, 1), 3).order == (1, 0, 2)
    greedy = of_choice("m", "", Choice((0, 2), order=(2, 0)), 3)
    assert (greedy.order, greedy.kept) == ((), (0, 2))


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """`jaxhybrid select --compare` on a run of 28 layers, all scored; its teacher is a depth alone."""
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(
        f"name: c\nteacher: none\nrun_dir: {run}\ndata: {{train: pydoc}}\nselect: {{method: kl_guided, budget: 2}}\n"
    )
    (run / "score" / "scores").mkdir(parents=True)
    for layer in range(28):
        kl = HELDOUT.get(layer, 1.0 + layer)
        curves = {"heldout": [[0, 50.0], [100, kl]], "train": [[100, float(layer)]]}
        (run / "score" / "scores" / f"{layer:03d}.json").write_text(json.dumps({"layer": layer, **curves}))
    files = SimpleNamespace(config=SimpleNamespace(num_layers=28))
    monkeypatch.setattr(RunModels, "teacher_files", files)
    monkeypatch.delenv("COLUMNS", raising=False)  # a table for programs to read has no width

    def invoke(*options):
        result = CliRunner().invoke(app, ["select", str(tmp_path / "config.yaml"), *options])
        if result.exception:
            raise result.exception
        return result.stdout

    return invoke


def test_compare_shows_what_is_at_hand_and_published(compare, tmp_path):
    found = json.loads(compare("--compare", "--json", "--with", "kl_guided"))
    lists = {one["name"]: one for one in found["lists"]}
    assert lists["kl_guided"]["layers"] == [8, 14]
    assert {"first", "middle", "last", "uniform"} < lists.keys()
    assert not {"random", "explicit", "greedy_kl"} & lists.keys()
    pair = next(p for p in found["pairs"] if {p["a"], p["b"]} == {"kl_guided", "Llama-3.2-3B-Instruct: GA-S2 (GLA)"})
    assert pair["jaccard"] == 1.0
    assert pair["correlation"] is not None
    assert not (tmp_path / "run" / "layers.json").exists()
    text = compare("--compare", "--with", "kl_guided")
    line = next(line for line in text.splitlines() if line.startswith("Llama-3.2-3B-Instruct: GA-S2 (GLA)"))
    assert line.split("(GLA)")[1].split()[:4] == ["8", "14", "1.00", f"{pair['correlation']:+.2f}"]
    assert "Qwen2.5-3B-Instruct:" not in text  # it has 36 layers
    assert "Two random sets overlap by 0.05" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json",), "--with and --json belong to --compare"),
        (("--compare", "--with", "greedy"), "--with greedy is no method of selection; choose of activation_mse"),
    ],
)
def test_bad_comparisons_are_refused(compare, options, message):
    with pytest.raises(Exception, match=message):
        compare(*options)


@pytest.mark.slow
def test_methods_run_in_a_run(whole):
    """By the command line: questions by the teacher's tokenizer, training text, the measured student."""
    sizes = "select.measure={tokens: 512, sequence_length: 64, batch_size: 8}"
    own = [
        "select.supernet={tokens: 1024, sequence_length: 64, batch_size: 8}",
        "select.answer_likelihood={pairs: 2, samples: 4}",
        "select.associative_recall={pairs: 2, samples: 4}",
    ]
    names = [setting.split("=")[0].removeprefix("select.") for setting in own]
    asked = [part for name in names for part in ("--with", name)]
    found = json.loads(whole.finish("select", whole.config, sizes, *own, "--compare", "--json", *asked))
    lists = {one["name"]: one["layers"] for one in found["lists"]}
    assert {*names, "alignment_loss", "kl_guided (heldout KL)", "kl_guided (training KL)"} <= lists.keys()
    assert all(len(layers) == found["count"] for layers in lists.values())
    for name in names:
        rounds = json.loads((whole.run / "select" / f"compare-{name}.json").read_text())["rounds"]
        assert rounds[-1]["forward_tokens"] > 0
