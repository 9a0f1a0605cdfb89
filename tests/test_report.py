"""The report of a run folder: what it shows, what it says is missing, what it refuses."""

import base64
import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import image

from jaxhybrid.errors import RunError
from jaxhybrid.report import evaluation_table, notes, write_report
from jaxhybrid.report.plots import _spread
from jaxhybrid.report.table import lm_eval_rows
from jaxhybrid.selection.ranking import CandidateScore, Scores
from jaxhybrid.settings.budget import layers_in_budget

DEPTH = 12
KEPT = [3, 6, 10]


def share(value, low, high):
    return {"share": value, "low": low, "high": high}


def recall_of(right, thirds=True):
    """Figures as `recall_figures` gives them, around one share of right answers."""
    names = ["first_query", "later_queries", *(f"{third}_third" for third in ("first", "middle", "last") if thirds)]
    return {
        "right": share(right, right - 0.031, right + 0.02),
        **{name: share(right - 0.01 * i, 0.0, 1.0) for i, name in enumerate(names, 1)},
        "first_token": share(right + 0.015, 0.0, 1.0),
        "another_name": share(0.7 * (1 - right), 0.0, 1.0),
    }


def recall_task(pairs, filler, chance, applies=True, **models):
    figures = {name: recall_of(right, pairs > 2) for name, right in models.items()}
    return {
        "pairs": pairs, "filler_tokens": filler, "prompts": 500, "prompt_tokens": 300.5, "chance": chance,
        "applies": applies, "models": figures,
    }  # fmt: skip


EVALUATION = {
    "models": {
        "teacher": {"perplexity": 14.256, "kl": 0.0, "tokens": 8192},
        "distill": {"perplexity": 17.901, "kl": 0.21384, "tokens": 8192},
        "finetune": {"perplexity": 1016.5, "kl": None, "tokens": 8192},
    },
    "softmax_layers": KEPT,
    "heldout_tokens": 8192,
    "recall": [
        recall_task(2, 0, {"right": 0.5, "first_token": 0.55}, teacher=0.96, distill=0.85, finetune=0.8),
        recall_task(16, 2048, {"right": 1 / 16, "first_token": 0.17}, teacher=0.94, distill=0.35, finetune=0.25),
        recall_task(64, 2048, {"right": 1 / 64, "first_token": 0.12}, applies=False, teacher=0.612),
    ],
}
EARLIER_EVALUATION = {  # of the probe before, whose files lie in the folders of old runs
    "models": {
        "teacher": {"perplexity": 14.256, "kl": 0.0, "tokens": 8192, "recall_4": 1.0, "recall_16": 0.95},
        "distill": {"perplexity": 17.901, "kl": 0.21384, "tokens": 8192, "recall_4": 0.85, "recall_16": 0.3},
        "finetune": {"perplexity": 1016.5, "kl": 0.2501, "tokens": 8192, "recall_4": 0.9, "recall_16": None},
    },
    "softmax_layers": KEPT,
    "heldout_tokens": 8192,
    "recall_samples": 20,
}


def make_scores(depth=DEPTH, kept=KEPT, points=8):
    rng = np.random.default_rng(0)
    candidates = []
    for layer in range(depth):
        final = 0.4 - (0.02 * (kept.index(layer) + 1) if layer in kept else -0.001 * layer)
        tokens = [i * 10_240 for i in range(points + 1)]
        heldout = [
            (t, final + 2 * math.exp(-6 * t / tokens[-1]) + 0.01 * rng.normal() * (t < tokens[-1])) for t in tokens
        ]
        candidates.append(CandidateScore(layer, heldout[1:], heldout))
    return Scores(tuple(candidates))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def write_stage(folder, steps=60, start=3.0, **summary):
    """What the training loop and `Pipeline._finish` leave; a stage without a summary is not done."""
    losses = [start * math.exp(-3 * i / steps) + 0.1 for i in range(1, steps + 1)]
    records = [
        {"step": i, "tokens": i * 2048, "loss": loss, "gradient_norm": 1.0, "tokens_per_second": 5000.0 + i}
        for i, loss in enumerate(losses, 1)
    ]
    write(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    if summary:
        write(
            folder / "done.json",
            {
                "steps": steps,
                "tokens": steps * 2048,
                "loss_first": losses[0],
                "loss_last": losses[-1],
                "tokens_per_second": 5030,
                "peak_memory_bytes": 3 * 2**30,
            }
            | summary,
        )


def write_scores(run, scores, kept, budget=0.25):
    budgets = {"0.125": 0.125, "0.25": 0.25, "5": 5}
    depth = len(scores.candidates)
    importance = {str(layer): value for layer, value in scores.importance().items()}
    write(
        run / "scores.json",
        {
            "ranking": scores.ranking(),
            "ranking_by_training_kl": scores.ranking("train"),
            "importance": importance,
            "stability": {name: scores.stability(layers_in_budget(b, depth)) for name, b in budgets.items()},
            "candidates": [candidate.to_json() for candidate in scores.candidates],
        },
    )
    write(
        run / "layers.json",
        {
            "method": "kl_guided",
            "budget": budget,
            "softmax_layers": kept,
            "ranking": scores.ranking(),
            "importance": importance,
            "stability": scores.stability(len(kept)),
            "other_budgets": {"0.125": kept[:2], "0.25": kept, "5": sorted(scores.ranking()[:5])},
        },
    )


def make_run(run):
    """A run that has done everything."""
    write(run / "config.yaml", "name: a <b>bold</b> & run\nteacher: demo\nmixer: {kind: gated_deltanet}\n"
          "select: {method: kl_guided}\n")  # fmt: skip
    write(run / "versions.json", {"python": "3.12.1", "jax": "0.12.0.1", "devices": "1 x <cpu>"})
    before, after = [0.5 + 0.05 * i for i in range(DEPTH)], [0.2 + 0.02 * i for i in range(DEPTH)]
    write_stage(
        run / "align",
        heldout_loss_before=float(np.mean(before)),
        heldout_loss_after=float(np.mean(after)),
        heldout_layer_loss_before=before,
        heldout_layer_loss_after=after,
        mean_segment_tokens=843.2,
    )
    write(
        run / "score" / "done.json",
        {
            "compiled_programs": {"train_step": 1},
            "candidate_tokens": 983_040,
            "seconds": 240.5,
            "tokens_per_second": None,
            "peak_memory_bytes": 2**31,
        },
    )
    write_scores(run, make_scores(), KEPT)
    write_stage(run / "distill", note="")
    write_stage(run / "finetune", steps=1, note="")
    write(run / "evaluation.json", EVALUATION)
    return run


FIGURES = {"recall", "importance", "candidate_curves", "stability", "layer_losses", "align", "distill", "finetune"}


def figures(run):
    return {path.stem for path in (run / "report").glob("*.png")}


def text_of(page):
    return re.sub(r'src="data:[^"]*"', "", page.read_text(encoding="utf-8"))


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', text_of(page), re.S)[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("run")))


def test_every_figure_is_drawn_and_embedded(page):
    assert figures(page.parent.parent) == FIGURES
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    files = {path.read_bytes() for path in page.parent.glob("*.png")}
    assert {base64.b64decode(data) for data in embedded} == files
    for path in page.parent.glob("*.png"):
        pixels = image.imread(path)
        assert pixels.shape[1] >= 1000
        assert pixels[..., :3].std() > 0.05, f"{path.name} is nearly empty"
    assert "not run" not in text_of(page)


def test_an_evaluation_of_the_earlier_probe_is_shown_and_named(tmp_path):
    write(tmp_path / "config.yaml", "name: old\n")
    write(tmp_path / "evaluation.json", EARLIER_EVALUATION)
    page = write_report(tmp_path)
    evaluation = section(page, "evaluation")
    for words in ("recall_4", "recall_16", "85.0 %", "20 prompts", "does not compare models"):
        assert words in evaluation
    assert figures(tmp_path) == set()


def test_page_needs_no_network(page):
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", page.read_text())


def test_numbers_are_in_the_tables(page):
    evaluation = section(page, "evaluation")
    for number in ("14.26", "17.90", "1,016.50", "0.2138", "8,192 held-out", "500 prompts each", "2 pairs", "50.0 %"):
        assert number in evaluation
    for number in ("16 pairs + 2,048", "94.0 % (91-96)", "35.0 % (32-37)", "34.0 %", "45.5 %", "6.2 %"):
        assert number in evaluation
    assert "Recall of 64 pairs with 2,048 tokens of prose does not apply to this teacher: 61.2 %" in evaluation
    stages = section(page, "stages")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", stages, re.S)[1:]]
    assert rows[0][:7] == ["align", "done", "60", "122,880", "843", "5,030", "3.00"]
    assert rows[0][7:] == [f"{3 * math.exp(-3 / 60) + 0.1:.4f}", f"{3 * math.exp(-3) + 0.1:.4f}"]
    assert rows[1] == [
        "score",
        "done",
        "–",
        "983,040",
        "–",
        "–",
        "2.00",
        "–",
        "–",
    ]  # as runs before segments were measured
    layers = section(page, "layers")
    assert re.findall(r'class="softmax">(\d+)<', layers) == ["3", "6", "10"]
    assert "12.5 % (2 layers)" in layers
    assert "3 of 12 layers kept softmax, chosen by kl_guided" in text_of(page)


def test_text_from_files_is_escaped(page):
    text = text_of(page)
    assert "<h1>a &lt;b&gt;bold&lt;/b&gt; &amp; run</h1>" in text
    assert "1 x &lt;cpu&gt;" in text
    assert "<b>" not in text
    assert "name: a &lt;b&gt;" in section(page, "settings")


def test_a_new_run_names_what_is_missing(tmp_path):
    write(tmp_path / "config.yaml", "name: new\nselect: {method: kl_guided}\n")
    page = write_report(tmp_path)
    assert figures(tmp_path) == set()
    assert "evaluate: not run" in section(page, "evaluation")
    assert "select: not run" in section(page, "layers")
    assert "score: not run" in section(page, "scores")
    assert all(f"{stage}: not run" in section(page, "training") for stage in ("align", "distill", "finetune"))
    assert section(page, "stages").count("not run") == 4
    assert "not recorded" in section(page, "versions")
    assert "needs no scores" not in section(page, "scores")
    write(tmp_path / "config.yaml", "name: new\n")
    assert "The choice by greedy_kl needs no scores" in section(write_report(tmp_path), "scores")


def test_uniform_choice_needs_no_scores(tmp_path):
    write(tmp_path / "config.yaml", "name: u\nselect: {method: uniform}\n")
    write(
        tmp_path / "layers.json",
        {"method": "uniform", "budget": 2, "softmax_layers": [1, 3], "other_budgets": {"0.5": [1, 3]}},
    )
    page = write_report(tmp_path)
    assert "The choice by uniform needs no scores" in section(page, "scores")
    assert "1, 3" in section(page, "layers")


def test_a_half_done_stage_shows_what_it_has(tmp_path):
    write(tmp_path / "config.yaml", "name: half\nselect: {method: kl_guided}\n")
    write_stage(tmp_path / "distill", steps=5)
    write(tmp_path / "score" / "scores" / "000.json", make_scores().candidates[0].to_json())
    (tmp_path / "align").mkdir()
    page = write_report(tmp_path)
    assert figures(tmp_path) == {"distill"}
    assert "distill: started, not done" in section(page, "training")
    assert "align: started, no step is recorded" in section(page, "training")
    assert "score: started" in section(page, "scores")
    assert "10,240" in section(page, "stages")
    assert "5,004" in section(page, "stages")  # the median without the first record, which waits for compilation


def test_a_second_report_replaces_the_first(tmp_path):
    run = tmp_path / "run"
    write(run / "config.yaml", "name: again\n")
    write(run / "evaluation.json", EVALUATION)
    write_stage(run / "distill", note="")
    write_stage(run / "finetune", note="")
    first = write_report(run).read_bytes()
    assert figures(run) == {"recall", "distill", "finetune"}
    assert write_report(run).read_bytes() == first
    (run / "evaluation.json").unlink()
    (run / "finetune").rename(tmp_path / "elsewhere")
    text = text_of(write_report(run))
    assert "evaluate: not run" in text
    assert "finetune: not run" in text
    assert {path.name for path in (run / "report").iterdir()} == {"index.html", "distill.png"}
    assert not list(run.glob(".report*"))


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(RunError, match=re.escape(f"{tmp_path / 'nowhere'} is not a run folder")):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=re.escape(f"{tmp_path} is not a run folder")):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
    write(tmp_path / "config.yaml", "name: [broken\n")
    with pytest.raises(RunError, match=r"config\.yaml is not valid YAML"):
        write_report(tmp_path)
    write(tmp_path / "config.yaml", "name: ok\n")
    write(tmp_path / "layers.json", "{")
    with pytest.raises(RunError, match=r"layers\.json is not valid JSON"):
        write_report(tmp_path)


def test_evaluation_table_is_aligned():
    assert evaluation_table(EVALUATION).splitlines() == EVALUATION_TABLE.splitlines()


EVALUATION_TABLE = """\
model     perplexity      KL
--------  ----------  ------
teacher        14.26  0.0000
distill        17.90  0.2138
finetune    1,016.50       -

recall of         model       right (95 %)  1st asked   later  1st third     2nd     3rd  1st token  another's
----------------  --------  --------------  ---------  ------  ---------  ------  ------  ---------  ---------
2 pairs           chance            50.0 %          -       -          -       -       -     55.0 %          -
2 pairs           teacher   96.0 % (93-98)     95.0 %  94.0 %          -       -       -     97.5 %      2.8 %
2 pairs           distill   85.0 % (82-87)     84.0 %  83.0 %          -       -       -     86.5 %     10.5 %
2 pairs           finetune  80.0 % (77-82)     79.0 %  78.0 %          -       -       -     81.5 %     14.0 %
16 pairs + 2,048  chance             6.2 %          -       -          -       -       -     17.0 %          -
16 pairs + 2,048  teacher   94.0 % (91-96)     93.0 %  92.0 %     91.0 %  90.0 %  89.0 %     95.5 %      4.2 %
16 pairs + 2,048  distill   35.0 % (32-37)     34.0 %  33.0 %     32.0 %  31.0 %  30.0 %     36.5 %     45.5 %
16 pairs + 2,048  finetune  25.0 % (22-27)     24.0 %  23.0 %     22.0 %  21.0 %  20.0 %     26.5 %     52.5 %

Recall of 64 pairs with 2,048 tokens of prose does not apply to this teacher: 61.2 % of its answers are right (58-63), too few to compare students by.
"""  # noqa: E501


def test_an_evaluation_of_the_earlier_probe_is_a_table():
    assert evaluation_table(EARLIER_EVALUATION).splitlines() == [
        "model     perplexity      KL  recall_4  recall_16",
        "--------  ----------  ------  --------  ---------",
        "teacher        14.26  0.0000   100.0 %     95.0 %",
        "distill        17.90  0.2138    85.0 %     30.0 %",
        "finetune    1,016.50  0.2501    90.0 %          -",
    ]


@pytest.mark.parametrize("places", [[0.1, 0.1, 0.1], [0.9, 0.95, 1.0], [0.0, 0.5, 0.99], [0.3] * 10])
def test_labels_at_line_ends_do_not_overlap(places):
    moved = _spread(places, 0.1)
    assert len(moved) == len(places)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(moved))
    assert moved[0] >= 0.05 - 1e-9
    assert moved[-1] <= 0.95 + 1e-9


def test_labels_with_room_stay_and_crowded_ones_spread_both_ways():
    assert _spread([0.2, 0.5, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.45, 0.55, 0.9])


def round_of(action, layer, kept, kl, **more):
    scores = {str(i): kl + i for i in range(3)}
    return {"action": action, "layer": layer, "kept": kept, "kl": kl, "tokens": 2048, "scores": scores} | more


def test_a_greedy_choice_is_shown_round_by_round(tmp_path):
    rounds = [
        round_of("start", None, [], 0.88),
        round_of("keep", 3, [3], 0.51, rescored={"3": 0.51, "2": 0.52}),
        round_of("keep", 1, [1, 3], 0.3217),
        round_of("swap", 2, [1, 2], 0.3105, out=3),
    ]
    flops = "2 x parameters x tokens"
    cost = {"forward_tokens": 12_288, "trained_tokens": 0, "flops": 3.3e9, "flops_are": flops}
    write(tmp_path / "config.yaml", "name: g\nselect: {method: greedy_kl}\n")
    chosen = {"method": "greedy_kl", "budget": 2, "softmax_layers": [1, 2], "rounds": rounds, "cost": cost}
    write(tmp_path / "layers.json", chosen)
    page = write_report(tmp_path)
    assert figures(tmp_path) == {"kept_curve"}
    scores = section(page, "scores")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", scores, re.S)[1:]]
    assert rows[1] == ["keep", "3", "1", "0.5100", "3", "2,048", "2"]
    assert rows[3] == ["swap", "2 for 3", "2", "0.3105", "3", "2,048", "-"]
    assert "12,288 tokens forward and 0 in training, 3.3e+09 FLOPs (2 x parameters" in scores
    assert "The choice by greedy_kl needs no scores" in scores


@pytest.mark.parametrize("order", [1, -1])
def test_rounds_of_several_methods_are_no_search_of_one(tmp_path, order):
    write(tmp_path / "config.yaml", "name: m\nselect: {method: average_rank}\n")
    importance = {str(i): 0.1 * i for i in range(4)}
    rank = {"action": "rank", "scores": importance, "tokens": 10, "forward_tokens": 20, "of": "single_kl"}
    rounds = [round_of("start", None, [0, 1], 0.5, of="removal"), round_of("drop", 0, [1], 0.625, of="removal")]
    cost = {"forward_tokens": 12_288, "trained_tokens": 0, "flops": 3.3e9, "flops_are": "2 x"}
    chosen = {"method": "average_rank", "budget": 1, "softmax_layers": [3], "importance": importance, "cost": cost}
    chosen["rounds"] = [*rounds, rank][::order]
    write(tmp_path / "layers.json", chosen)
    write_report(tmp_path)
    assert figures(tmp_path) == {"layer_importance"}
    assert "KL" not in notes.choice(chosen)


def test_a_ranking_without_scores_is_drawn(tmp_path):
    write(tmp_path / "config.yaml", "name: r\nselect: {method: cosine}\n")
    importance = {str(i): 0.1 * i for i in range(4)}
    rounds = [{"action": "rank", "scores": importance, "tokens": 10, "forward_tokens": 20}]
    chosen = {"method": "cosine", "budget": 1, "softmax_layers": [3], "importance": importance, "rounds": rounds}
    write(tmp_path / "layers.json", chosen)
    page = write_report(tmp_path)
    assert figures(tmp_path) == {"layer_importance"}
    assert "What cosine measured" in section(page, "scores")
    assert re.findall(r'class="softmax">(\d+)<', section(page, "layers")) == ["3"]


def test_errors_of_lm_eval_stand_with_their_figures():
    figures = {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": 0.01,
        "f1,x": 0.2,
    }
    header, rows = lm_eval_rows({"lm_eval": {"teacher": {"t": figures}, "distill": {"t": figures}}})
    assert header == ["task of lm-eval", "figure", "teacher", "distill"]
    assert rows == [
        ["t", name, value, value]
        for name, value in {
            "acc": "0.5000 (+-0.1960)", "exact_match,strict": "0.2500 (+-0.0196)", "f1,x": "0.2000",
        }.items()
    ]  # fmt: skip
