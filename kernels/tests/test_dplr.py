"""RWKV-7's recurrence: results and each gradient of every implementation against the float64 token recurrence."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels import dplr_attention, dplr_attention_step

CHUNKED = ["xla", "pallas_tpu"]  # the latter is interpreted where there is no TPU
BOUNDS = (0, 30, 64, 128)  # a change of segment inside a chunk, and one at its border


@dataclass
class Case:
    """Arguments in float64 numpy, and the cotangents of both results."""

    arrays: dict[str, np.ndarray]
    d_out: np.ndarray
    d_state: np.ndarray
    segment_ids: np.ndarray | None = None

    def slice(self, start, stop):
        arrays = {n: x if n == "initial_state" else x[:, start:stop] for n, x in self.arrays.items()}
        segment_ids = None if self.segment_ids is None else self.segment_ids[:, start:stop]
        return Case(arrays, self.d_out[:, start:stop], self.d_state, segment_ids)


def make_case(T, *, B=2, N=2, K=16, V=24, correlation=0.0, rate=None, decay=0.2, seed=0):
    """RWKV-7's arguments: a = -kappa, b = kappa * rate, with unit kappa of the given pairwise correlation."""
    rng = np.random.default_rng(seed)
    own, shared = rng.normal(size=(B, T, N, K)), rng.normal(size=(1, 1, N, K))
    kappa = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * shared
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    rates = rng.uniform(size=(B, T, N, K)) if rate is None else rate
    arrays = {
        "q": rng.normal(size=(B, T, N, K)),
        "k": rng.normal(size=(B, T, N, K)) * K**-0.5,
        "v": rng.normal(size=(B, T, N, V)),
        "log_decay": -decay * np.abs(rng.normal(size=(B, T, N, K))),
        "a": -kappa,
        "b": kappa * rates,
        "initial_state": rng.normal(size=(B, N, K, V)),
    }
    return Case(arrays, rng.normal(size=(B, T, N, V)), rng.normal(size=(B, N, K, V)))


@partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def results_and_gradients(arrays, segment_ids, d_out, d_state, implementation, chunk_size=None):
    def run(arrays):
        return dplr_attention(**arrays, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size)

    (out, state), pull = jax.vjp(run, arrays)
    return (out, state), pull((d_out.astype(out.dtype), d_state.astype(state.dtype)))[0]


def oracle(case):
    with jax.enable_x64(True):
        segments = np.ones(case.d_out.shape[:2], np.int32) if case.segment_ids is None else case.segment_ids
        results = results_and_gradients(case.arrays, segments, case.d_out, case.d_state, "reference")
        assert results[0][0].dtype == jnp.float64
        return jax.tree.map(np.asarray, results)


def case32(case):
    return {name: jnp.asarray(array, jnp.float32) for name, array in case.arrays.items()}


def run(case, implementation, dtype=jnp.float32, chunk_size=None):
    arrays = case32(case)
    arrays = {n: x if n in ("log_decay", "initial_state") else x.astype(dtype) for n, x in arrays.items()}
    segments = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)
    d_out, d_state = jnp.asarray(case.d_out, jnp.float32), jnp.asarray(case.d_state, jnp.float32)
    return results_and_gradients(arrays, segments, d_out, d_state, implementation, chunk_size)


@pytest.mark.parametrize("tokens", [7, 64, 65])
def test_results_and_gradients(suite, implementation, tokens):
    case = make_case(tokens)
    suite.check(run(case, implementation), oracle(case))


@pytest.mark.parametrize("chunk_size", [16, 32, 128])
def test_chunk_sizes(suite, chunk_size):
    case = make_case(100)
    suite.check(run(case, "xla", chunk_size=chunk_size), oracle(case))


def test_rows_of_the_paper(suite):
    """RWKV-7 keeps the transposed state: S_t = S_{t-1} (diag(w) - kappa' (rate * kappa)) + v' k, read as S_t r."""
    case = make_case(9, B=1, N=1)
    q, k, v, log_decay, a, b = (x[0, :, 0] for x in list(case.arrays.values())[:6])
    kappa, state, outs = -a, case.arrays["initial_state"][0, 0].T, []
    for t in range(9):
        transition = np.diag(np.exp(log_decay[t])) - np.outer(kappa[t], b[t])
        state = state @ transition + np.outer(v[t], k[t])
        outs.append(state @ q[t])
    out, final = dplr_attention(**case32(case), scale=1.0)
    assert suite.relative_error(out[0, :, 0], outs) < 1e-5
    assert suite.relative_error(final[0, 0], state.T) < 1e-5


@pytest.mark.parametrize("correlation", [0.9, 0.99])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_correlated_keys(suite, implementation, correlation):
    """Rates of one and no decay: a power series for the inverse overflows here."""
    case = make_case(128, correlation=correlation, rate=1.0, decay=0.0)
    suite.check(run(case, implementation), oracle(case))


@pytest.mark.parametrize("decay", [0.0, 20.0])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_no_decay_and_strong_decay(suite, implementation, decay):
    case = make_case(128, decay=decay)
    suite.check(run(case, implementation), oracle(case))


@pytest.mark.parametrize("implementation", CHUNKED)
def test_one_token_that_forgets_among_tokens_that_keep(suite, implementation):
    case = make_case(128, decay=0.01)
    case.arrays["log_decay"][:, 3] = -3000.0
    case.arrays["log_decay"][:, 70] = -3000.0
    suite.check(run(case, implementation), oracle(case), forward=2e-6, backward=2e-5)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_zero_rows(suite, implementation):
    case = make_case(128)
    for name in ("q", "k", "v", "a", "b"):
        case.arrays[name][:, 20:40] = 0.0
    suite.check(run(case, implementation), oracle(case))


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_bfloat16_gradients(implementation, correlation):
    """Every gradient points where the float64 one does, that of the decay above all."""
    case = make_case(128, B=1, K=64, V=64, correlation=correlation, decay=0.05)
    for name in ("q", "k", "v", "a", "b"):
        case.arrays[name] = np.asarray(jnp.asarray(case.arrays[name], jnp.bfloat16), np.float64)
    case.d_out = np.asarray(jnp.asarray(case.d_out, jnp.bfloat16), np.float64)
    (out, state), gradients = run(case, implementation, jnp.bfloat16)
    (out_expected, state_expected), expected = oracle(case)
    assert (out.dtype, state.dtype, gradients["a"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    pairs = {"out": (out, out_expected), "state": (state, state_expected)}
    pairs |= {name: (gradients[name], expected[name]) for name in expected}
    for name, (actual, wanted) in pairs.items():
        actual, wanted = np.asarray(actual, np.float64).ravel(), wanted.ravel()
        cosine = actual @ wanted / np.sqrt((actual @ actual) * (wanted @ wanted))
        assert cosine > 0.999, f"{name}: cosine {cosine:.5f}"


@pytest.mark.parametrize("implementation", CHUNKED)
def test_packed_equals_separate(suite, implementation):
    case = make_case(BOUNDS[-1])
    case.segment_ids = np.repeat([[4, 2, 9]], 2, axis=0).repeat(np.diff(BOUNDS), axis=1)
    (out, state), gradients = run(case, implementation)
    for index, (start, stop) in enumerate(pairwise(BOUNDS)):
        part = case.slice(start, stop)
        part.segment_ids = None
        last = stop == BOUNDS[-1]
        if index:
            part.arrays["initial_state"] = np.zeros_like(part.arrays["initial_state"])
        if not last:
            part.d_state = np.zeros_like(part.d_state)
        (out_part, state_part), gradients_part = oracle(part)
        assert suite.relative_error(out[:, start:stop], out_part) < 1e-5
        if last:
            assert suite.relative_error(state, state_part) < 1e-5
        for name, expected in gradients_part.items():
            if name != "initial_state":
                assert suite.relative_error(gradients[name][:, start:stop], expected) < 1e-4, name
            elif index == 0:
                assert suite.relative_error(gradients[name], expected) < 1e-4


@pytest.mark.parametrize("implementation", ["xla", "recurrent", "pallas_tpu"])
def test_padding_of_any_content_changes_nothing(suite, implementation):
    """Left, middle and right padding, holding NaN: the same as the sequence without it, from the same initial state."""
    bare = make_case(108)
    places = np.concatenate([np.arange(9, 29), np.arange(33, 121)])
    case = make_case(128)
    for name, array in case.arrays.items():
        if name == "initial_state":
            array[:] = bare.arrays[name]
        else:
            array[:] = np.nan
            array[:, places] = bare.arrays[name]
    case.d_out[:, places] = bare.d_out
    case.d_state = bare.d_state
    case.segment_ids = np.zeros((2, 128), np.int32)
    case.segment_ids[:, places] = 3
    (out, state), gradients = run(case, implementation)
    (out_bare, state_bare), gradients_bare = oracle(bare)
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


@pytest.mark.parametrize("implementation", ["xla", "recurrent", "reference", "pallas_tpu"])
def test_all_padding_keeps_the_state(implementation):
    case = make_case(128)
    case.segment_ids = np.zeros((2, 128), np.int32)
    (out, state), _ = run(case, implementation)
    assert np.all(np.asarray(out) == 0)
    np.testing.assert_array_equal(state, case.arrays["initial_state"].astype(np.float32))


@pytest.mark.parametrize("implementation", CHUNKED)
def test_two_parts_make_the_whole(suite, implementation):
    """The final state carries on where it stopped, and its gradient carries back."""
    border = 37 if implementation == "xla" else 64
    case = make_case(128)
    (out, state), gradients = oracle(case)
    first, second = case.slice(0, border), case.slice(border, 128)
    (out_first, between), _ = run(first, implementation)
    second.arrays["initial_state"] = np.asarray(between)
    (out_second, final), gradients_second = run(second, implementation)
    first.d_state = np.asarray(gradients_second["initial_state"])
    _, gradients_first = run(first, implementation)
    assert suite.relative_error(np.concatenate([out_first, out_second], axis=1), out) < 1e-5
    assert suite.relative_error(final, state) < 1e-5
    for name, expected in gradients.items():
        if name == "initial_state":
            actual = gradients_first[name]
        else:
            actual = np.concatenate([gradients_first[name], gradients_second[name]], axis=1)
        assert suite.relative_error(actual, expected) < 1e-4, name


def test_steps_equal_the_sequence(suite):
    arrays = case32(make_case(20))
    state = arrays.pop("initial_state")
    step = jax.jit(dplr_attention_step, static_argnames="scale")
    out, final = dplr_attention(**arrays, initial_state=state, scale=0.3)
    for t in range(20):
        out_t, state = step(**{name: array[:, t] for name, array in arrays.items()}, state=state, scale=0.3)
        assert suite.relative_error(out_t, out[:, t]) < 1e-5
    assert suite.relative_error(state, final) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 8, 2)}, "q has shape .*tokens, heads, width"),
        ({"q": (2, 8, 1, 16)}, "q has shape"),
        ({"k": (2, 9, 2, 16)}, "k has shape"),
        ({"v": (2, 0, 2, 24)}, "v has shape"),
        ({"log_decay": (2, 8, 2)}, "log_decay has shape"),
        ({"a": (2, 8, 2, 24)}, "a has shape"),
        ({"b": (2, 8, 1, 16)}, "b has shape"),
        ({"initial_state": (2, 2, 24, 16)}, "initial_state has shape"),
        ({"segment_ids": (2, 7)}, "segment_ids has shape"),
    ],
)
def test_wrong_shapes_are_refused(changes, message):
    arrays = case32(make_case(8)) | {name: jnp.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        dplr_attention(**arrays)


def test_wrong_values_and_dtypes_are_refused():
    arrays = case32(make_case(8))
    for changes, message in [
        ({"implementation": "fast"}, "implementation='fast'.*available: reference, recurrent, xla, pallas_tpu"),
        ({"chunk_size": 48}, "chunk_size=48"),
        ({"chunk_size": 32, "implementation": "pallas_tpu"}, "chunk_size=32: pallas_tpu"),
        ({"v": jnp.zeros((2, 8, 2, 300)), "initial_state": None, "implementation": "pallas_tpu"}, "v has V=300"),
        ({"scale": "half"}, "scale='half'"),
        ({"a": arrays["a"].astype(jnp.int32)}, "a has dtype int32"),
        ({"segment_ids": jnp.ones((2, 8))}, "segment_ids has dtype float32"),
        ({"initial_state": arrays["initial_state"].astype(jnp.bfloat16)}, "initial_state has dtype bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            dplr_attention(**(arrays | changes))
    one = {name: array[:, 0] for name, array in arrays.items() if name != "initial_state"}
    with pytest.raises(ValueError, match="state has shape"):
        dplr_attention_step(**one, state=arrays["initial_state"][:, :1])


@pytest.mark.slow
@pytest.mark.parametrize(("N", "K", "V"), [(3, 64, 128), (2, 128, 64), (4, 128, 128), (2, 96, 32)])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_widths(suite, implementation, N, K, V):
    case = make_case(130, B=1, N=N, K=K, V=V, correlation=0.5)
    case.segment_ids = np.repeat([[4, 2]], [50, 80], axis=1)
    suite.check(run(case, implementation), oracle(case))


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_long_sequences(suite, implementation, correlation):
    """Errors must not grow with the length."""
    case = make_case(4096, B=1, K=64, V=64, correlation=correlation, decay=0.01)
    suite.check(run(case, implementation), oracle(case))
