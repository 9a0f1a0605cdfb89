"""The training loop: exact resume, a stop by signal, and a loss that is not finite."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import DivergenceError, RunError
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.interrupt import Interrupted
from jaxhybrid.train.loop import train
from jaxhybrid.train.metrics import Recorder, read_metrics
from jaxhybrid.train.optimizer import make_optimizer, start, update
from tests.harms import cut, flipped, gone
from tests.tiny import training

STAGE = training(20, tokens=200, sequence_length=10, checkpoint_every=6, log_every=4)


class Stream:
    """Batch n is a function of n; can be told to do something before a batch is handed out."""

    def __init__(self, before=None):
        self.position, self.before = 0, before

    def __next__(self):
        if self.before:
            self.before(self.position)
        self.position += 1
        return {"x": np.random.default_rng(self.position).normal(size=(4, 3)).astype(np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def problem():
    params = {"blocks": {"w": jnp.ones((3,))}}
    optimizer = make_optimizer(training(20, learning_rate=0.1), params)

    @jax.jit
    def step(state, batch):
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((batch["x"] @ p["blocks"]["w"] - 1) ** 2))(state.params)
        state, norm = update(state, gradients, optimizer)
        return state, {"loss": loss, "gradient_norm": norm}

    return start(params, optimizer), step


def run(folder, before=None):
    state, step = problem()
    return train(state, step, Stream(before), folder, STAGE, "align")


@pytest.mark.parametrize("harm", [cut, gone, lambda path: flipped(path, np.random.default_rng(0))])
def test_records_come_back_with_the_checkpoint_whatever_became_of_their_file(tmp_path, harm):
    run(tmp_path / "whole")

    def stop(position):
        if position == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path / "harmed", stop)
    with harm(tmp_path / "harmed" / "metrics.jsonl"):
        run(tmp_path / "harmed")
        found = read_metrics(tmp_path / "harmed")
    assert without_speed(found) == without_speed(read_metrics(tmp_path / "whole"))


def without_speed(records):
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), read_metrics(folder)


@pytest.mark.parametrize("stop_at", [2, 6, 17])
def test_resume_after_an_exception_is_bit_exact(tmp_path, uninterrupted, stop_at):
    def crash(position):
        if position == stop_at:
            raise OSError("the machine went away")

    with pytest.raises(OSError, match="went away"):
        run(tmp_path, crash)
    state = run(tmp_path)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[0])):
        np.testing.assert_array_equal(a, b)
    assert without_speed(read_metrics(tmp_path)) == without_speed(uninterrupted[1])


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(tmp_path, uninterrupted):
    def terminate(position):
        if position == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 10 of 20") as stopped:
        run(tmp_path, terminate)
    assert stopped.value.exit_code == 143
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest == 10
    checkpoints.close()
    state = run(tmp_path)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[0])):
        np.testing.assert_array_equal(a, b)
    # Step 10 lies between two records: the one at 12 is the mean of 9 to 12 all the same.
    assert without_speed(read_metrics(tmp_path)) == without_speed(uninterrupted[1])


def test_a_signal_while_a_step_is_recorded_waits_for_the_next_one(tmp_path, uninterrupted, monkeypatch):
    write = Recorder.write

    def write_and_terminate(self, record):
        write(self, record)
        if record["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "write", write_and_terminate)
        with pytest.raises(Interrupted, match="after step 9 of 20"):
            run(tmp_path)
    assert (tmp_path / "checkpoints" / "9").is_dir()
    state = run(tmp_path)
    np.testing.assert_array_equal(state.params["blocks"]["w"], uninterrupted[0].params["blocks"]["w"])


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, uninterrupted, monkeypatch):
    write = Recorder.write

    def write_and_terminate(self, record):
        write(self, record)
        if record["step"] == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "write", write_and_terminate)
        with pytest.raises(Interrupted, match="signal 15 after its last step"):
            run(tmp_path)
    state = run(tmp_path)
    np.testing.assert_array_equal(state.params["blocks"]["w"], uninterrupted[0].params["blocks"]["w"])


def test_a_loss_that_is_not_finite_names_step_batch_and_checkpoint(tmp_path):
    state, step = problem()

    def poisoned(state, batch):
        state, metrics = step(state, batch)
        return state, {**metrics, "loss": jnp.where(state.step == 9, jnp.nan, metrics["loss"])}

    with pytest.raises(DivergenceError, match=r"loss is nan at step 9; .*last good checkpoint is step 6") as stopped:
        train(state, poisoned, Stream(), tmp_path, STAGE, "align")
    saved = np.load(tmp_path / "bad-batch-9.npz")
    np.testing.assert_array_equal(saved["x"], np.random.default_rng(9).normal(size=(4, 3)).astype(np.float32))
    assert "bad-batch-9.npz" in str(stopped.value)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest == 6
    checkpoints.close()


def test_measurements_are_recorded_between_steps(tmp_path):
    state, step = problem()
    train(
        state,
        step,
        Stream(),
        tmp_path,
        STAGE,
        "align",
        measure=lambda state, done: {"heldout": 1.0} if done % 10 == 0 else None,
    )
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if "heldout" in r] == [10, 20]
    assert [r["step"] for r in records if "loss" in r] == [4, 8, 10, 12, 16, 20]
    assert all(r["tokens"] == 10 * r["step"] for r in records)


def test_half_a_line_of_metrics_is_forgotten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    run(tmp_path)
    params = {"blocks": {"v": jnp.ones((5,))}}
    other = start(params, make_optimizer(training(20), params))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="does not fit this run"):
        checkpoints.restore(other)
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="file"):
        run(tmp_path / "file" / "stage")
