"""Scoring in rounds: the same figures as in one go, and an end as soon as the best layers stay the same."""

import jax
import numpy as np
import pytest

from jaxhybrid.errors import ConfigError, DivergenceError, RunError
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model
from jaxhybrid.selection import kl_guided
from jaxhybrid.selection.kl_guided import _Programs, score_candidates
from jaxhybrid.selection.ranking import Scores, read_scores
from jaxhybrid.settings.run import DataConfig, RunConfig
from jaxhybrid.settings.select import select_config
from jaxhybrid.settings.stages import ScoreConfig
from jaxhybrid.weights.convert import convert
from tests.tiny import stop_rule

STEPS, ROWS, LENGTH = 4, 2, 16
SETTINGS = ScoreConfig(
    tokens=STEPS * ROWS * LENGTH,
    sequence_length=LENGTH,
    batch_size=ROWS,
    warmup_steps=0,
    learning_rate=1e-3,
    mixer_learning_rate=1e-2,
    evaluate_every=1,
    checkpoint_every=100,
    log_every=1,
)
CONFIG = RunConfig(name="scoring", teacher="none", data=DataConfig(train="pydoc"), dtype="float32")


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


HELDOUT = [(1.0, [batch_of(99)])]


@pytest.fixture(scope="module")
def score(teacher, compiled_once):
    student = convert(teacher, (GatedDeltaNetConfig.kind,) * 4, GatedDeltaNetConfig(), jax.random.key(1))
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])

    def run(folder, candidates=range(4), batches=Stream, select=select_config(), heldout=HELDOUT, **changes):  # noqa: B008  # frozen
        settings = SETTINGS.model_copy(update=changes)
        config = CONFIG.model_copy(update={"score": settings, "select": select})
        with jax.set_mesh(mesh):
            own = Model(jax.device_put(student.params, jax.NamedSharding(mesh, jax.P())), student.config)
            other = Model(jax.device_put(teacher.params, jax.NamedSharding(mesh, jax.P())), teacher.config)
            compiled = score_candidates(other, own, config, batches, heldout, folder, mesh, candidates)
        return read_scores(folder / "scores", 4), compiled

    return run


@pytest.fixture(scope="module")
def in_one_go(score, tmp_path_factory):
    """Scores of candidates that were trained in one go."""
    scores, compiled = score(tmp_path_factory.mktemp("in_one_go"))
    assert set(compiled.values()) == {1}
    assert [tokens for tokens, _ in scores.candidates[0].heldout] == [i * ROWS * LENGTH for i in range(STEPS + 1)]
    return scores


def test_answers_count_by_their_share(score, in_one_go, tmp_path):
    """Of the same rows: all tokens, a few of them, and a mixture, by one program."""
    asked = [batch_of(99) | {"counted": np.float32(np.arange(LENGTH) % 5 == 0) * np.ones((ROWS, 1), np.float32)}]
    whole = [candidate.heldout for candidate in in_one_go.candidates[:2]]
    (few, compiled), (mixed, _) = (
        score(tmp_path / name, heldout=heldout, tokens=SETTINGS.tokens_per_step)
        for name, heldout in (("few", [(1.0, asked)]), ("mixed", [(0.75, HELDOUT[0][1]), (0.25, asked)]))
    )
    assert compiled["heldout_kl"] == 1
    for all_tokens, some, both in zip(whole, few.candidates, mixed.candidates):
        a, b = np.array(all_tokens)[:1, 1], np.array(some.heldout)[:1, 1]
        assert abs(a - b) > 1e-3 * a
        np.testing.assert_allclose(np.array(both.heldout)[:1, 1], 0.75 * a + 0.25 * b, rtol=1e-5)


def test_with_accumulation_no_program_runs_more_rows_than_an_update(score, in_one_go, tmp_path, monkeypatch):
    rows, place = set(), kl_guided.place_batch

    def watched(batch, mesh, microbatches=1):
        rows.add(len(batch["tokens"]) // microbatches)
        return place(batch, mesh, microbatches)

    monkeypatch.setattr(kl_guided, "place_batch", watched)
    scores, compiled = score(tmp_path, gradient_accumulation=2)
    assert rows == {ROWS // 2}
    assert set(compiled.values()) == {1}
    for ours, theirs in zip(scores.candidates, in_one_go.candidates):
        np.testing.assert_allclose(ours.heldout, theirs.heldout, rtol=1e-4)
        np.testing.assert_allclose(ours.train, theirs.train, rtol=1e-4)


# Rounds of two steps, never stable.
ROUNDS = {"stop_when_stable": stop_rule(window=1, jaccard=2.0, every=2)}


class Interference:
    """Does something when the n-th training of a candidate is taken up: 1 to 4 in the first round, then 5 to 8."""

    def __init__(self, acts):
        self.acts, self.opened = acts, 0

    def __call__(self):
        self.opened += 1
        return self.acts.get(self.opened, Stream)() or Stream()


BREAKING = type("Breaking", (Stream,), {"breaks_at": 3})


def kept(folder, layer):
    """The data file of the one state that is kept of a candidate, after two steps."""
    (state,) = (folder / "candidates" / f"{layer:03d}").glob("kept/*")
    assert state.name == "2"
    (data,) = (state / "state" / "ocdbt.process_0" / "d").iterdir()
    return data


def test_rounds_give_the_scores_of_one_go_even_when_a_state_is_damaged(score, in_one_go, tmp_path, monkeypatch):
    measure, measured = _Programs.heldout_kl, []

    def counted(self, params, layer, heldout):
        measured.append(int(layer))
        return measure(self, params, layer, heldout)

    monkeypatch.setattr(_Programs, "heldout_kl", counted)

    def damage():
        assert not list(tmp_path.glob("candidates/*/checkpoints/*"))
        data = [kept(tmp_path, layer) for layer in range(4)][1]
        data.write_bytes(data.read_bytes()[:-1] + b"?")

    with pytest.warns(UserWarning, match=r"001/kept/2.*The candidate of layer 1 starts over"):
        rounds, compiled = score(
            tmp_path, batches=Interference({5: damage}), checkpoint_every=1, keep_teacher_states=False, **ROUNDS
        )
    assert rounds == in_one_go
    assert set(compiled.values()) == {1}
    again = [1, 1]  # the two measurements of the damaged one
    assert sorted(measured) == sorted([*range(4)] * (1 + STEPS) + again)  # untrained once, not in every round


def test_rounded_candidates_score_nearly_the_same_however_often_they_are_stopped(score, in_one_go, tmp_path):
    sizes = []
    rounded = ROUNDS | {"kept_dtype": "bfloat16", "checkpoint_every": 1}

    def look():
        sizes.append(kept(tmp_path / "undisturbed", 0).stat().st_size)

    expected, compiled = score(tmp_path / "undisturbed", batches=Interference({5: look}), **rounded)
    assert set(compiled.values()) == {1}
    for ours, exact in zip(expected.candidates, in_one_go.candidates):
        np.testing.assert_allclose(ours.heldout, exact.heldout, rtol=5e-3)
        assert ours.heldout[:3] == exact.heldout[:3]  # nothing was rounded yet
        assert ours.heldout[3:] != exact.heldout[3:]

    with pytest.raises(OSError, match="went away"):
        score(tmp_path / "stopped", batches=Interference({6: BREAKING}), **rounded)
    exact = tmp_path / "stopped" / "candidates" / "001" / "checkpoints" / "3" / "state" / "ocdbt.process_0" / "d"
    (data,) = exact.iterdir()
    assert 0.3 < sizes[0] / data.stat().st_size < 0.6
    assert score(tmp_path / "stopped", **rounded)[0] == expected


def test_a_resumed_candidate_goes_on_with_the_teachers_states_of_its_own_batches(score, in_one_go, tmp_path):
    with pytest.raises(OSError, match="went away"):
        score(tmp_path, batches=BREAKING, checkpoint_every=2)
    assert score(tmp_path)[0] == in_one_go


def test_scoring_ends_when_the_best_layers_stay_the_same(score, tmp_path, capsys, monkeypatch):
    judge, asked = Scores.is_stable, []

    def listened(self, rule, best, by):
        asked.append((rule, best, by))
        return judge(self, rule, best, by)

    monkeypatch.setattr(Scores, "is_stable", listened)
    rule = stop_rule(window_tokens=2 * ROWS * LENGTH)
    every_layer = select_config(budget=4, rank_by="train")  # all four are always the best four
    stopped, _ = score(tmp_path, stop_when_stable=rule, select=every_layer)
    assert {c.heldout[-1][0] for c in stopped.candidates} == {3 * ROWS * LENGTH}
    assert "have not moved for 64 tokens" in capsys.readouterr().out
    assert asked == [(rule, 4, "train")]  # in the first round that could end it
    assert not list(tmp_path.glob("candidates/*")) + list(tmp_path.glob("teacher-*"))


def test_rounds_need_all_candidates_and_candidates_must_exist(score, tmp_path):
    with pytest.raises(ConfigError, match="drop --candidates"):
        score(tmp_path, candidates=range(2), stop_when_stable=stop_rule(window=3))
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
        score(tmp_path, candidates=range(1), learning_rate=float("nan"), mixer_learning_rate=float("nan"))
