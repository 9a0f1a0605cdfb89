"""The soak in short: one run that is killed, damaged, without disk and terminated, each time gone on with."""

from tests.soak import Harm, Soak, compare

HARMS = [
    Harm("kill", "align", act=60),
    Harm("full", "align", act=75, seed=2),
    Harm("flip", "score", act=130, seed=3),
    Harm("term", "finetune", act=40),
]


def test_a_run_that_is_harmed_at_every_turn_ends_like_one_that_was_not(whole, tmp_path):
    lines = []
    Soak(whole, lines.append, devices=1).run(tmp_path / "run", HARMS, [1])
    compare(tmp_path / "run", whole.run, exact=True)
    assert len(lines) == len(HARMS), lines
