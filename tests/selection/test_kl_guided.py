"""Scoring in rounds: the same figures as in one go, and an end as soon as the best layers stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import ConfigError, DivergenceError, RunError
from jaxhybrid.model.config import GATED_DELTANET, GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection.kl_guided import ScoringConfig, score_candidates
from jaxhybrid.selection.ranking import read_scores
from jaxhybrid.train.optimizer import OptimizerConfig
from jaxhybrid.weights.convert import convert

STEPS, ROWS, LENGTH = 4, 2, 16


class Stream:
    """Batch n is a function of n. The machine goes away before batch number `breaks_at`, if any."""

    position, breaks_at = 0, None

    def __next__(self):
        if self.position == self.breaks_at:
            raise OSError("the machine went away")
        self.position += 1
        return batch_of(self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def batch_of(number):
    tokens = np.random.default_rng(number).integers(0, 61, (ROWS, LENGTH)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


@pytest.fixture(scope="module")
def score(teacher):
    student = convert(teacher, (GATED_DELTANET,) * 4, GatedDeltaNetConfig(), jax.random.key(1))
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])

    def run(folder, candidates=range(4), batches=Stream, **changes):
        settings = {
            "optimizer": OptimizerConfig(STEPS, learning_rate=1e-3, mixer_learning_rate=1e-2),
            "evaluate_every": 1,
            "checkpoint_every": 100,
            "log_every": 1,
            "dtype": jnp.float32,
        }
        config = ScoringConfig(batch_size=ROWS, sequence_length=LENGTH, **settings | changes)
        with jax.set_mesh(mesh):
            own = Model(jax.device_put(student.params, jax.NamedSharding(mesh, jax.P())), student.config)
            other = Model(jax.device_put(teacher.params, jax.NamedSharding(mesh, jax.P())), teacher.config)
            compiled = score_candidates(other, own, config, batches, [batch_of(99)], folder, mesh, candidates)
        return read_scores(folder / "scores", 4), compiled

    return run


def test_rounds_and_recomputed_teacher_give_the_scores_of_one_go(score, tmp_path):
    whole, compiled = score(tmp_path / "whole")
    assert set(compiled.values()) == {1}
    assert [tokens for tokens, _ in whole.candidates[0].heldout] == [i * ROWS * LENGTH for i in range(STEPS + 1)]
    rounds, compiled = score(
        tmp_path / "rounds", stop_budget=1, stop_window=100, stop_jaccard=1.0, keep_teacher_states=False
    )
    assert set(compiled.values()) == {1}
    assert rounds == whole


def test_a_resumed_candidate_goes_on_with_the_teachers_states_of_its_own_batches(score, tmp_path):
    whole, _ = score(tmp_path / "whole")
    breaking = type("Breaking", (Stream,), {"breaks_at": 3})
    with pytest.raises(OSError, match="went away"):
        score(tmp_path / "resumed", batches=breaking, checkpoint_every=2)
    resumed, _ = score(tmp_path / "resumed")
    assert resumed == whole


def test_scoring_ends_when_the_best_layers_stay_the_same(score, tmp_path, capsys):
    stopped, _ = score(tmp_path, stop_budget=4, stop_window=2, stop_jaccard=1.0)  # all four are always the best four
    assert {c.heldout[-1][0] for c in stopped.candidates} == {3 * ROWS * LENGTH}
    assert "have not moved for 2 rounds" in capsys.readouterr().out
    assert not list(tmp_path.glob("candidates/*")) + list(tmp_path.glob("teacher-*"))


def test_rounds_need_all_candidates_and_candidates_must_exist(score, tmp_path):
    with pytest.raises(ConfigError, match="drop --candidates"):
        score(tmp_path, candidates=range(2), stop_budget=1)
    with pytest.raises(ConfigError, match=r"Candidates \[4, 5\] do not exist"):
        score(tmp_path, candidates=range(3, 6))


def test_what_killed_jobs_left_is_removed_and_other_jobs_keep_their_own(score, tmp_path):
    killed, elsewhere = "teacher-train-000-002-0", "teacher-train-002-003-0"
    for name in (killed, elsewhere):
        for suffix in (".bin", ".present", ".json"):
            (tmp_path / f"{name}{suffix}").touch()
    with pytest.raises(RunError, match=r"\[2, 3\]"):  # not scored yet
        score(tmp_path, candidates=range(2))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["candidates", "scores", *(f"{elsewhere}{suffix}" for suffix in (".bin", ".json", ".present"))]


def test_a_held_out_kl_that_is_not_finite_is_named(score, tmp_path):
    with pytest.raises(DivergenceError, match=r"KL of the candidate of layer 0 is nan\. Lower score\.learning_rate"):
        score(tmp_path, candidates=range(1), optimizer=OptimizerConfig(STEPS, learning_rate=float("nan")))
