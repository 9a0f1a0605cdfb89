"""Several runs side by side: seeds of one kind of run are one row, others are not."""

import pytest

from jaxhybrid.errors import RunError
from jaxhybrid.report.compare import compare_runs
from tests.test_report import recall_task, write


def make(folder, seed, kl, budget=0.25, right=0.9, prompts="abc", evaluate="{}"):
    write(folder / "config.yaml", f"name: {folder.name}\nteacher: t\nseed: {seed}\ndata: {{train: pydoc}}\n"
          f"select: {{budget: {budget}}}\nevaluate: {evaluate}\n")  # fmt: skip
    rows = {"teacher": {"perplexity": 10.0, "kl": 0.0}, "distill": {"perplexity": 12.0, "kl": kl}}
    able = recall_task(4, 0, {"right": 0.25}, teacher=0.96, distill=right)
    unable = recall_task(64, 0, {"right": 1 / 64}, applies=False, teacher=0.3)
    task = {"task": "vt", "length": 4096, "applies": True, "models": {"distill": {"score": {"share": right}}}}
    harness = {"distill": {"gsm8k": {"exact_match,strict-match": right, "exact_match_stderr,strict-match": 0.01}}}
    write(folder / "evaluation.json", {"models": rows, "recall": [able, unable], "tasks": [task | {"hash": prompts}],
                                         "lm_eval": harness})  # fmt: skip
    return folder


def test_seeds_of_one_kind_of_run_are_one_row(tmp_path):
    runs = [make(tmp_path / f"s{seed}", seed, kl) for seed, kl in enumerate((0.1, 0.2, 0.6))]
    other = make(tmp_path / "half", 0, 0.05, budget=0.5)
    header, rows = compare_runs([*runs, other])
    assert header[-3:] == ["mean", "95 % over seeds", "seeds"]
    found = {tuple(row[:3]): row[3:] for row in rows}
    assert found[str(runs[0]), "distill", "kl"] == ["0.3000", "-0.3572 to 0.9572", "3"]
    assert found[str(other), "distill", "kl"] == ["0.0500", "-", "1"]
    assert found[str(runs[0]), "distill", "recall of 4 pairs"][0] == "0.9000"
    assert found[str(runs[0]), "distill", "vt, 4,096"][0] == "0.9000"
    assert found[str(runs[0]), "distill", "gsm8k, exact_match,strict-match"][0] == "0.9000"
    assert not any("64 pairs" in row[2] or "stderr" in row[2] for row in rows)


def test_seeds_that_were_evaluated_otherwise_are_no_row(tmp_path):
    one = make(tmp_path / "one", 0, 0.1)
    for name, changes, message in (
        ("tokens", {"evaluate": "{heldout_tokens: 500}"}, r"evaluate\.heldout_tokens: 1000000 -> 500"),
        ("pairs", {"evaluate": "{recall: {samples: 7}}"}, r"evaluate\.recall\.samples: 500 -> 7"),
        ("prompts", {"prompts": "xyz"}, "prompts of vt, 4,096: abc -> xyz"),
    ):
        with pytest.raises(
            RunError, match=rf"one and .*{name} differ in their seed alone, .* otherwise:\n  {message}\n"
        ):
            compare_runs([one, make(tmp_path / name, 1, 0.1, **changes)])
    same = make(tmp_path / "same", 1, 0.1, evaluate="{batch_size: 4, ablations: true}")
    other = make(tmp_path / "half", 1, 0.1, budget=0.5, prompts="xyz")  # of another kind, a row of its own
    assert {row[-1] for row in compare_runs([one, same, other])[1]} == {"1", "2"}


def test_what_cannot_be_compared_is_refused(tmp_path):
    one, same = (make(tmp_path / name, 0, 0.1) for name in ("one", "same"))
    with pytest.raises(RunError, match=r"same and .*one have the same settings and seed 0"):
        compare_runs([one, same])
    (one / "evaluation.json").unlink()
    with pytest.raises(RunError, match=r"one has no evaluation yet\. Run `jaxhybrid evaluate"):
        compare_runs([one])
