"""Every recurrence and implementation against the float64 token recurrence: results, and each gradient by itself."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("tokens", [7, 65])
@pytest.mark.parametrize("implementation", ["xla", "recurrent"])
def test_results_and_gradients(suite, recurrence, implementation, tokens):
    case = suite.make_case(recurrence, tokens)
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
@pytest.mark.parametrize("recurrence", ["gated_deltanet", "kimi_delta"])
def test_odd_lengths(suite, recurrence, tokens):
    case = suite.make_case(recurrence, tokens)
    suite.check(suite.run(case, "xla"), suite.oracle(case))


@pytest.mark.parametrize(
    ("recurrence", "chunk_size"), [("gated_deltanet", 16), ("gla", 16), ("deltanet", 32), ("kimi_delta", 128)]
)
def test_chunk_sizes(suite, recurrence, chunk_size):
    case = suite.make_case(recurrence, 100)
    suite.check(suite.run(case, "xla", chunk_size=chunk_size), suite.oracle(case))


@pytest.mark.parametrize(
    ("recurrence", "Hq", "Hk", "N"),
    [
        ("gated_deltanet", 1, 1, 2),
        ("gated_deltanet", 2, 1, 2),
        ("gated_deltanet", 4, 2, 2),
        ("simple_gla", 4, 1, 2),
        ("kimi_delta", 4, 1, 2),
    ],
)
def test_shared_and_grouped_heads(suite, recurrence, Hq, Hk, N):
    case = suite.make_case(recurrence, 40, Hq=Hq, Hk=Hk, N=N)
    expected = suite.oracle(case)
    suite.check(suite.run(case, "xla"), expected)
    suite.check(suite.run(case, "recurrent"), expected)


@pytest.mark.parametrize("correlation", [0.9, 0.99])
@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("recurrence", ["deltanet", "gated_deltanet", "kimi_delta"])
def test_correlated_keys(suite, recurrence, correlation, rate):
    """What a pretrained key projection gives: without decay, a power series for the inverse overflows here."""
    case = suite.make_case(recurrence, 128, correlation=correlation, rate=rate, decay=0.0)
    if rate == 1.0:
        case.arrays["beta"][:] = 1.0
    suite.check(suite.run(case, "xla"), suite.oracle(case))


@pytest.mark.parametrize("decay", [0.0, 20.0])
@pytest.mark.parametrize("recurrence", ["simple_gla", "gla", "gated_deltanet", "kimi_delta"])
def test_no_decay_and_strong_decay(suite, recurrence, decay):
    case = suite.make_case(recurrence, 128, decay=decay)
    suite.check(suite.run(case, "xla"), suite.oracle(case))


@pytest.mark.parametrize("recurrence", ["gated_deltanet", "kimi_delta"])
def test_one_token_that_forgets_among_tokens_that_keep(suite, recurrence):
    """A difference of large running sums must keep the digits of the small decays behind the large one."""
    case = suite.make_case(recurrence, 128, decay=0.01)
    case.arrays["log_decay"][:, 3] = -3000.0
    case.arrays["log_decay"][:, 70] = -3000.0
    suite.check(suite.run(case, "xla"), suite.oracle(case), forward=2e-6, backward=2e-5)


def test_zero_rows(suite, recurrence):
    case = suite.make_case(recurrence, 128)
    for name in ("q", "k", "v"):
        case.arrays[name][:, 20:40] = 0.0
    suite.check(suite.run(case, "xla"), suite.oracle(case))


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_bfloat16_gradients(suite, recurrence, correlation):
    """Every gradient points where the float64 one does, those of the gates above all."""
    case = suite.make_case(recurrence, 128, B=1, K=64, V=64, correlation=correlation, decay=0.05)
    for name in ("q", "k", "v"):
        case.arrays[name] = np.asarray(jnp.asarray(case.arrays[name], jnp.bfloat16), np.float64)
    case.d_out = np.asarray(jnp.asarray(case.d_out, jnp.bfloat16), np.float64)
    (out, state), gradients = suite.run(case, "xla", jnp.bfloat16)
    (out_expected, state_expected), expected = suite.oracle(case)
    assert (out.dtype, state.dtype, gradients["q"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    pairs = {"out": (out, out_expected), "state": (state, state_expected)}
    pairs |= {name: (gradients[name], expected[name]) for name in expected}
    for name, (a, b) in pairs.items():
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b).ravel()
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        assert cosine > 0.999, f"{name}: cosine {cosine:.5f}"
