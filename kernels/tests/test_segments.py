"""Packed sequences, padding, and sequences continued from a state."""

from itertools import pairwise

import numpy as np
import pytest

BOUNDS = (0, 30, 64, 128, 130)  # a change inside a chunk, and changes at the borders of both sizes of chunk


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_packed_equals_separate(suite, recurrence, implementation):
    case = suite.make_case(recurrence, BOUNDS[-1])
    case.segment_ids = np.repeat([[4, 2, 9, 4]], 2, axis=0).repeat(np.diff(BOUNDS), axis=1)
    (out, state), gradients = suite.run(case, implementation)
    for index, (start, stop) in enumerate(pairwise(BOUNDS)):
        part = case.slice(start, stop)
        part.segment_ids = None
        last = stop == BOUNDS[-1]
        if index:
            part.arrays["initial_state"] = np.zeros_like(part.arrays["initial_state"])
        if not last:
            part.d_state = np.zeros_like(part.d_state)
        (out_part, state_part), gradients_part = suite.oracle(part)
        assert suite.relative_error(out[:, start:stop], out_part) < 1e-5
        if last:
            assert suite.relative_error(state, state_part) < 1e-5
        for name, expected in gradients_part.items():
            if name != "initial_state":
                assert suite.relative_error(gradients[name][:, start:stop], expected) < 1e-4, name
            elif index == 0:
                assert suite.relative_error(gradients[name], expected) < 1e-4


@pytest.mark.parametrize("recurrence", ["linear_attention", "gated_deltanet", "kimi_delta"])
def test_padding_of_any_content_changes_nothing(suite, recurrence, implementation):
    """Left, middle and right padding, holding NaN: the same as the sequence without it, from the same initial state."""
    places = np.concatenate([np.arange(9, 29), np.arange(33, 129)])
    bare = suite.make_case(recurrence, len(places))
    case = suite.make_case(recurrence)
    for name, array in case.arrays.items():
        if name == "initial_state":
            array[:] = bare.arrays[name]
        else:
            array[:] = np.nan
            array[:, places] = bare.arrays[name]
    case.d_out[:, places] = bare.d_out
    case.d_state = bare.d_state
    case.segment_ids = np.zeros((2, case.tokens), np.int32)
    case.segment_ids[:, places] = 3
    (out, state), gradients = suite.run(case, implementation)
    (out_bare, state_bare), gradients_bare = suite.oracle(bare)
    padding = case.segment_ids[0] == 0
    assert np.all(np.asarray(out)[:, padding] == 0)
    assert suite.relative_error(out[:, places], out_bare) < 1e-5
    assert suite.relative_error(state, state_bare) < 1e-5
    if implementation == "recurrent":  # differentiated by JAX, where NaN times zero is NaN
        return
    for name, expected in gradients_bare.items():
        gradient = gradients[name] if name == "initial_state" else gradients[name][:, places]
        assert suite.relative_error(gradient, expected) < 1e-4, name
        if name != "initial_state":
            assert np.all(np.asarray(gradients[name])[:, padding] == 0), name


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "recurrent", "reference"])
def test_all_padding_keeps_the_state(suite, implementation):
    case = suite.make_case("gated_deltanet", 20)
    case.segment_ids = np.zeros((2, 20), np.int32)
    (out, state), _ = suite.run(case, implementation)
    assert np.all(np.asarray(out) == 0)
    np.testing.assert_array_equal(state, case.arrays["initial_state"].astype(np.float32))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_two_parts_make_the_whole(suite, recurrence, implementation):
    """The final state carries on where it stopped, and its gradient carries back."""
    border = 64 if recurrence == "gla" else 37
    case = suite.make_case(recurrence)
    (out, state), gradients = suite.oracle(case)
    first, second = case.slice(0, border), case.slice(border, case.tokens)
    (out_first, between), _ = suite.run(first, implementation)
    second.arrays["initial_state"] = np.asarray(between)
    (out_second, final), gradients_second = suite.run(second, implementation)
    first.d_state = np.asarray(gradients_second["initial_state"])
    _, gradients_first = suite.run(first, implementation)
    assert suite.relative_error(np.concatenate([out_first, out_second], axis=1), out) < 1e-5
    assert suite.relative_error(final, state) < 1e-5
    for name, expected in gradients.items():
        if name == "initial_state":
            actual = gradients_first[name]
        else:
            actual = np.concatenate([gradients_first[name], gradients_second[name]], axis=1)
        assert suite.relative_error(actual, expected) < 1e-4, name
