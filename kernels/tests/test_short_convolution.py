"""Short convolution against a plain loop, steps, packing, padding and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels import short_convolution, short_convolution_step

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 12, 3)).astype(np.float32)
WEIGHT = RNG.normal(size=(4, 3)).astype(np.float32)
STATE = RNG.normal(size=(2, 3, 3)).astype(np.float32)


def loop(x, weight, state):
    """The definition, token by token."""
    padded = np.concatenate([state, x], axis=1).astype(np.float64)
    taps = weight.shape[0]
    y = np.stack([(padded[:, t : t + taps] * weight).sum(axis=1) for t in range(x.shape[1])], axis=1)
    return y, padded[:, x.shape[1] :]


def test_definition_and_steps():
    y, final = short_convolution(X, WEIGHT, initial_state=STATE)
    expected, expected_final = loop(X, WEIGHT, STATE)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, expected_final, rtol=1e-6)
    state, outs = jnp.asarray(STATE), []
    for t in range(X.shape[1]):
        out, state = short_convolution_step(X[:, t], WEIGHT, state)
        outs.append(out)
    np.testing.assert_allclose(np.stack(outs, axis=1), y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state, final)


@pytest.mark.parametrize("tokens", [1, 2])
def test_sequences_shorter_than_the_filter(tokens):
    y, final = short_convolution(X[:, :tokens], WEIGHT, initial_state=STATE)
    expected, expected_final = loop(X[:, :tokens], WEIGHT, STATE)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, expected_final, rtol=1e-6)


def test_identity_filter_of_one_tap():
    y, final = short_convolution(X, np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(y, X)
    assert final.shape == (2, 0, 3)


def test_packed_equals_separate():
    segments = np.repeat([[7, 5, 6]], 2, axis=0).repeat([5, 5, 2], axis=1)
    y, final = short_convolution(X, WEIGHT, segments, STATE)
    zeros = np.zeros_like(STATE)
    parts = [loop(X[:, :5], WEIGHT, STATE), loop(X[:, 5:10], WEIGHT, zeros), loop(X[:, 10:], WEIGHT, zeros)]
    np.testing.assert_allclose(y, np.concatenate([part[0] for part in parts], axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(final, parts[-1][1], rtol=1e-6)


def test_padding_of_any_content_changes_nothing():
    padded = np.full((2, 19, 3), np.nan, np.float32)
    padded[0, 5:17], padded[1, 1:13] = X
    segments = np.zeros((2, 19), np.int32)
    segments[0, 5:17], segments[1, 1:13] = 3, 4
    y, final = short_convolution(padded, WEIGHT, segments, STATE)
    expected, expected_final = loop(X, WEIGHT, STATE)
    np.testing.assert_allclose([y[0, 5:17], y[1, 1:13]], expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(y)[segments == 0] == 0)
    np.testing.assert_allclose(final, expected_final, rtol=1e-6)
    _, kept = short_convolution(padded, WEIGHT, np.zeros_like(segments), STATE)
    np.testing.assert_array_equal(kept, STATE)


def test_gradients():
    """Against central differences, through both results and with a change of segment."""
    segments = jnp.asarray([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]] * 2)
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(a, jnp.float64) for a in (X, WEIGHT, STATE))

        def run(x, weight, state):
            y, final = short_convolution(x, weight, segments, state)
            return jnp.sum(jnp.sin(y)) + jnp.sum(final**2)

        gradients = jax.grad(run, argnums=(0, 1, 2))(*arrays)
        directions = [RNG.normal(size=a.shape) for a in arrays]
        slope = sum(jnp.sum(g * d) for g, d in zip(gradients, directions))
        ends = [run(*(a + sign * 1e-5 * d for a, d in zip(arrays, directions))) for sign in (1, -1)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], WEIGHT), "x has shape"),
        ((X, WEIGHT[:, :2]), "weight has shape"),
        ((X, WEIGHT, np.ones((2, 11), np.int32)), "segment_ids has shape"),
        ((X, WEIGHT, np.ones((2, 12), np.float32)), "segment_ids has dtype"),
        ((X, WEIGHT, None, STATE[:, :2]), "initial_state has shape"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(*arguments)
