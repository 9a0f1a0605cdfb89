"""One bit flipped, a file cut short or gone: whatever a later stage reads is found damaged and named, never used."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxhybrid.errors import DamageError, RunError
from jaxhybrid.run_folder import RunFolder
from jaxhybrid.selection.ranking import CandidateScore, read_scores, write_score
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.train.metrics import Recorder, read_metrics
from tests.harms import FLIPS, cut, flipped, gone, harms

STATE = {
    "step": jnp.int32(6),
    "params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32)},
}
POSITION = {"batches": {"taken": 6}, "unrecorded": []}


def checkpoints(folder: Path, *steps: int) -> Checkpoints:
    opened = Checkpoints(folder)
    for step in steps:
        opened.save(step, STATE | {"step": jnp.int32(step)}, POSITION, wait=True)
    return opened


def test_every_damage_to_a_checkpoint_is_found_and_named(tmp_path):
    opened = checkpoints(tmp_path, 6)
    for path, harm in harms(tmp_path / "6", seed=1):
        with harm, pytest.raises(DamageError, match=rf"{path.name}.* Delete the folder {tmp_path} to start over"):
            opened.restore(STATE)
    assert opened.restore(STATE)[1] == POSITION
    assert opened.latest == 6


def test_every_damage_to_finished_parameters_is_found_and_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.finish("align", {"steps": 3}, STATE["params"])
    for path, harm in harms(folder.stage("align") / "params", seed=2):
        with harm, pytest.raises(DamageError, match=rf"{path.name}.* Delete the folder .*align to train"):
            folder.load_params("align", STATE["params"])
    np.testing.assert_array_equal(folder.load_params("align", STATE["params"])["w"], STATE["params"]["w"])


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path):
    opened = checkpoints(tmp_path, 3, 6)
    (data,) = (tmp_path / "6" / "state" / "ocdbt.process_0" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match=rf"{data.name}.*set aside as {tmp_path / '6.damaged'}; going on from step 3"):
        state, _ = opened.restore(STATE)
    assert int(state["step"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6.damaged"]
    assert opened.latest == 3
    checkpoints(tmp_path, 6).close()  # the step is taken again, and damaged again
    (data,) = (tmp_path / "6" / "state" / "ocdbt.process_0" / "d").iterdir()
    data.unlink()
    with pytest.warns(UserWarning, match="going on from step 3"):
        opened.restore(STATE)
    assert len(list(tmp_path.glob("6.damaged*"))) == 2


def test_a_sector_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    opened = checkpoints(tmp_path, 3, 6)
    read = Path.open

    def fail(self, *arguments, **options):
        if self == tmp_path / "6" / "state" / "_METADATA":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.warns(UserWarning, match=r"6/state/_METADATA cannot be read \(Input/output error\): set aside"):
        assert int(opened.restore(STATE)[0]["step"]) == 3


def test_checkpoints_that_are_all_damaged_stay_where_they_are(tmp_path):
    opened = checkpoints(tmp_path, 3, 6)
    for step in ("3", "6"):
        (tmp_path / step / "_CHECKPOINT_METADATA").write_text("{")
    for _ in range(2):  # the second time is no new beginning
        with pytest.raises(DamageError, match=r"6/_CHECKPOINT_METADATA.*3/_CHECKPOINT_METADATA.*Delete the folder"):
            opened.restore(STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6"]


def test_a_checkpoint_that_does_not_fit_is_not_taken_for_damage(tmp_path):
    opened = checkpoints(tmp_path, 3, 6)
    with pytest.raises(RunError, match="does not fit this run") as refused:
        opened.restore(STATE | {"params": {"w": jnp.zeros((4, 3))}})
    assert not isinstance(refused.value, DamageError)
    assert opened.latest == 6


def test_parameters_without_checksums_are_read_with_a_note(tmp_path):
    ocp.save(tmp_path / "align" / "params", STATE["params"])  # as versions without checksums wrote them
    (tmp_path / "align" / "done.json").write_text("{}")
    with pytest.warns(UserWarning, match="params has no checksums"):
        params = RunFolder(tmp_path).load_params("align", STATE["params"])
    np.testing.assert_array_equal(params["w"], STATE["params"]["w"])


def test_checkpoints_without_checksums_are_read_with_a_note(tmp_path):
    earlier = ocp.training.Checkpointer(tmp_path / "stage")
    earlier.save(6, STATE, custom_metadata={"position": POSITION})
    earlier.close()
    with pytest.warns(UserWarning, match="6 has no checksums"):
        state, position = Checkpoints(tmp_path / "stage").restore(STATE)
    np.testing.assert_array_equal(state["params"]["w"], STATE["params"]["w"])
    assert position == POSITION
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):  # what orbax itself finds
        with cut(tmp_path / "stage" / "6" / name), pytest.raises(DamageError, match=r"stage/6 .*Delete the folder"):
            Checkpoints(tmp_path / "stage").restore(STATE)


def test_what_a_killed_process_left_of_a_checkpoint_does_not_count(tmp_path):
    checkpoints(tmp_path, 3).close()
    for name in ("6.draft", "6.draft.orbax-checkpoint-tmp", "6.orbax-checkpoint-tmp-17"):
        shutil.copytree(tmp_path / "3", tmp_path / name)
    assert Checkpoints(tmp_path).latest == 3
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


# --- results ----------------------------------------------------------------------------------------------------------


def test_every_damage_to_scores_is_found_or_harmless(tmp_path):
    score = CandidateScore(0, [(512, 2.25), (1024, 1.75)], [(0, 2.5), (512, 2.125), (1024, 1.625)])
    write_score(tmp_path, score)
    (path,) = tmp_path.iterdir()
    rng, messages = np.random.default_rng(3), []
    for _ in range(3 * FLIPS):
        with flipped(path, rng):
            try:
                assert read_scores(tmp_path, 1).candidates == (score,)  # a blank, or the name of the checksum
            except RunError as error:
                messages.append(str(error))
    assert all(str(path) in message and "`jaxhybrid score` again" in message for message in messages)
    assert len(messages) > 2 * FLIPS
    with cut(path), pytest.raises(RunError, match=r"000\.json is not valid JSON"):
        read_scores(tmp_path, 1)
    with gone(path), pytest.raises(RunError, match="1 of 1 layers have no score"):
        read_scores(tmp_path, 1)


def test_results_without_checksums_are_read(tmp_path):
    score = CandidateScore(0, [(512, 2.25)], [(0, 2.5), (512, 2.125)])
    (tmp_path / "000.json").write_text(json.dumps(score.to_json()))
    assert read_scores(tmp_path, 1).candidates == (score,)


def test_every_damage_to_records_is_found(tmp_path):
    recorder = Recorder(tmp_path, resume_step=0, total_tokens=9, done_tokens=0, label="x")
    for step in range(3):
        recorder.write({"step": step, "tokens": 512 * step, "loss": 1.5 / (step + 1)})
    recorder.close()
    path, rng = tmp_path / "metrics.jsonl", np.random.default_rng(4)
    whole, messages = read_metrics(tmp_path), []
    assert [record["step"] for record in whole] == [0, 1, 2]
    for _ in range(3 * FLIPS):
        with flipped(path, rng):
            try:
                read = read_metrics(tmp_path)
            except DamageError as error:
                messages.append(str(error))
                continue
            # The last end of line: that record was not whole yet. Or the checksum's name: that record has none.
            assert [{key: record[key] for key in whole[0]} for record in read] == whole[: len(read)]
            assert len(read) >= 2
    assert all(f"{path}, line " in message and f"Delete the folder {tmp_path}" in message for message in messages)
    assert len(messages) > 2 * FLIPS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError, match=rf"{path} has 2 records and had 3\. Delete the folder {tmp_path}"):
        read_metrics(tmp_path, 3)
    path.write_text('{"step": 1, "loss": 2.0}\n')  # without checksums
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
