"""Every recurrence and implementation against the float64 token recurrence: results, and each gradient by itself."""

import pytest

DELTA_RULES = ["deltanet", "gated_deltanet", "kimi_delta"]
CHUNKED = ["xla", "pallas_tpu"]


def _slow(recurrences, implementation, lengths):
    """Cases that only the slow suite runs."""
    return [
        pytest.param(name, implementation, tokens, marks=pytest.mark.slow) for name in recurrences for tokens in lengths
    ]


def test_results_and_gradients(suite, recurrence, implementation):
    case = suite.make_case(recurrence)
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize(
    ("recurrence", "implementation", "tokens"),
    [
        *((name, "xla", tokens) for name in ("gated_deltanet", "kimi_delta") for tokens in (1, 64, 100)),
        *((name, "recurrent", 7) for name in ("gated_deltanet", "kimi_delta")),
        ("gated_deltanet", "pallas_tpu", 1),
        ("gated_deltanet", "pallas_tpu", 128),
        ("kimi_delta", "pallas_tpu", 7),
        *_slow(("gated_deltanet", "kimi_delta"), "xla", (7, 63)),
        *_slow(("gated_deltanet", "kimi_delta"), "pallas_tpu", (129,)),
        *_slow(("linear_attention", "simple_gla", "gla", "deltanet"), "xla", (7,)),
        *_slow(("linear_attention", "simple_gla", "gla", "deltanet"), "recurrent", (7,)),
        *_slow(("linear_attention", "simple_gla", "gla", "deltanet"), "pallas_tpu", (7,)),
        *_slow(("gated_deltanet",), "pallas_tpu", (7,)),
        *_slow(("kimi_delta",), "pallas_tpu", (1, 128)),
    ],
)
def test_odd_lengths(suite, recurrence, implementation, tokens):
    case = suite.make_case(recurrence, tokens)
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize(
    ("recurrence", "chunk_size"), [("gated_deltanet", 16), ("gla", 16), ("deltanet", 32), ("kimi_delta", 128)]
)
def test_chunk_sizes(suite, recurrence, chunk_size):
    case = suite.make_case(recurrence, 100)
    suite.check(suite.run(case, "xla", chunk_size=chunk_size), suite.oracle(case))


@pytest.mark.parametrize(
    ("recurrence", "Hq", "Hk", "N"),
    [
        pytest.param("gated_deltanet", 1, 1, 2, marks=pytest.mark.slow),
        ("gated_deltanet", 2, 1, 2),
        ("gated_deltanet", 4, 2, 2),
        ("simple_gla", 4, 1, 2),
        ("kimi_delta", 4, 1, 2),
    ],
)
def test_shared_and_grouped_heads(suite, recurrence, implementation, Hq, Hk, N):
    case = suite.make_case(recurrence, 40, Hq=Hq, Hk=Hk, N=N)
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("correlation", [0.9, 0.99])
@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("recurrence", DELTA_RULES)
@pytest.mark.parametrize("implementation", CHUNKED)
def test_correlated_keys(suite, recurrence, implementation, correlation, rate):
    """What a pretrained key projection gives: without decay, a power series for the inverse overflows here."""
    case = suite.make_case(recurrence, correlation=correlation, rate=rate, decay=0.0)
    if rate == 1.0:
        case.arrays["beta"][:] = 1.0
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("recurrence", DELTA_RULES)
def test_tokens_that_write_nothing(suite, recurrence, implementation):
    """beta = 0, for whole blocks and among others."""
    case = suite.make_case(recurrence, correlation=0.9)
    case.arrays["beta"][:, 10:70] = 0.0
    case.arrays["beta"][:, 70::3] = 0.0
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("decay", [0.0, 20.0])
@pytest.mark.parametrize("recurrence", ["simple_gla", "gla", "gated_deltanet", "kimi_delta"])
def test_no_decay_and_strong_decay(suite, recurrence, implementation, decay):
    case = suite.make_case(recurrence, decay=decay)
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("recurrence", ["gated_deltanet", "kimi_delta"])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_one_token_that_forgets_among_tokens_that_keep(suite, recurrence, implementation):
    """A difference of large running sums must keep the digits of the small decays behind the large one."""
    case = suite.make_case(recurrence, decay=0.01)
    case.arrays["log_decay"][:, 3] = -3000.0
    case.arrays["log_decay"][:, 70] = -3000.0
    suite.check(suite.run(case, implementation), suite.oracle(case), forward=2e-6, backward=2e-5)


def test_zero_rows(suite, recurrence, implementation):
    case = suite.make_case(recurrence)
    for name in ("q", "k", "v"):
        case.arrays[name][:, 20:40] = 0.0
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_bfloat16_gradients(suite, recurrence, implementation, correlation):
    """Every gradient points where the float64 one does, those of the gates above all."""
    case = suite.make_case(recurrence, B=1, K=64, V=64, correlation=correlation, decay=0.05)
    suite.check_bfloat16(case, implementation)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 64), (128, 128), (192, 256), (256, 256)])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_widths(suite, recurrence, implementation, K, V):
    case = suite.make_case(recurrence, 300, B=1, N=4, Hq=2, Hk=2, K=K, V=V, correlation=0.5)
    suite.check(suite.run(case, implementation), suite.oracle(case))
    suite.check_bfloat16(suite.make_case(recurrence, 300, B=1, K=K, V=V, decay=0.05), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.5, 0.9])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_long_sequences(suite, recurrence, implementation, correlation):
    """Errors must not grow with the length: 4096 tokens within the bounds of 130."""
    case = suite.make_case(recurrence, 4096, B=1, K=64, V=64, correlation=correlation, decay=0.01)
    suite.check(suite.run(case, implementation), suite.oracle(case))
