"""The soak in short: one run without disk, killed, terminated and damaged, each time gone on with."""

from tests.soak import Harm, Soak, compare

HARMS = [
    Harm("full", "align", act=50, seed=2),
    Harm("kill", "score", act=130),
    Harm("term", "distill", act=30),
    Harm("flip", "finetune", act=60, seed=1, written="checkpoint"),
]


def test_a_run_that_is_harmed_on_the_way_ends_like_one_that_was_not(whole, tmp_path):
    lines = []
    Soak(whole, lines.append, devices=1).run(tmp_path / "run", HARMS, [1])
    compare(tmp_path / "run", whole.run, exact=True)
    full, killed, terminated, damaged = lines
    assert "or `ulimit -f` allows" in full
    assert "exit [-9]" in killed
    assert "after step" in terminated
    assert "set aside as" in damaged
