"""The teacher's states on disk: computed once, and again when they are no longer what was computed."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.selection.teacher_cache import TeacherCache
from tests.harms import harms

BATCHES, SHAPE = 3, (2, 8, 16)
STATES = np.random.default_rng(0).normal(size=(BATCHES, *SHAPE)).astype(jnp.bfloat16)


class Teacher:
    """Gives STATES, and counts how often it is asked."""

    runs = 0

    def __call__(self, index):
        self.runs += 1
        return STATES[index]


def fill(path, batches=range(BATCHES)):
    """What a cache at `path` gives for each batch, and how many the teacher was run for."""
    teacher = Teacher()
    cache = TeacherCache(path, BATCHES, *SHAPE, np.dtype(jnp.bfloat16))
    for index in batches:
        np.testing.assert_array_equal(cache.get(index, lambda: teacher(index)), STATES[index])  # noqa: B023
    return teacher.runs


def test_states_are_computed_once(tmp_path):
    assert fill(tmp_path / "a.bin", [1]) == 1
    assert fill(tmp_path / "a.bin") == 2
    assert fill(tmp_path / "a.bin") == 0


def test_states_are_computed_by_all_processes_or_none(tmp_path):
    teacher, told = Teacher(), []

    def not_everywhere(found):
        told.append(found)
        return False

    cache = TeacherCache(tmp_path / "a.bin", BATCHES, *SHAPE, np.dtype(jnp.bfloat16))
    for _ in range(2):
        np.testing.assert_array_equal(cache.get(1, lambda: teacher(1), not_everywhere), STATES[1])
    assert told == [False, True]
    assert teacher.runs == 2


def test_every_damage_is_found_and_mended(tmp_path):
    fill(tmp_path / "a.bin")
    for path, harm in harms(tmp_path, seed=6):
        with harm, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            runs = fill(tmp_path / "a.bin")
            assert runs == len(warned) == 0 or runs in (1, BATCHES)  # 0: the mark has another blank
            assert all(str(tmp_path) in str(warning.message) for warning in warned)
            assert path.suffix != ".bin" or warned
            assert fill(tmp_path / "a.bin") == 0


def test_a_cache_without_checksums_is_read(tmp_path):
    fill(tmp_path / "a.bin", [0, 2])
    (tmp_path / "a.sums").unlink()
    (tmp_path / "a.present").write_bytes(b"\1\0\1")
    with pytest.warns(UserWarning, match=r"a\.bin has no checksums"):
        assert fill(tmp_path / "a.bin") == 1
    assert fill(tmp_path / "a.bin") == 0
    assert not (tmp_path / "a.present").exists()
