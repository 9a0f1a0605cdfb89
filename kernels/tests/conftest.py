"""Cases, the float64 oracle and comparisons shared by the kernel tests; eight fake CPU devices for the sharded ones."""

import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Compiling is nearly all of the time here; leaving out LLVM's optimisations halves it.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_force_host_platform_device_count=8"
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels import linear_attention

RECURRENCES = {
    "linear_attention": (None, False),
    "simple_gla": ("head", False),
    "gla": ("channel", False),
    "deltanet": (None, True),
    "gated_deltanet": ("head", True),
    "kimi_delta": ("channel", True),
}
IMPLEMENTATIONS = ("xla", "recurrent", "pallas_tpu")  # the last is interpreted where there is no TPU
# Two chunks of the Pallas kernels, three of the XLA form, none of them full. Most tests share this length and so
# one compiled program per recurrence and implementation.
TOKENS = 130
LEAST_COSINE = 0.999  # in bfloat16
# For one form of the Hopper kernels, constants of gpu/linear_attention.py and sizes: with matrices prepared for few
# thread blocks, or made on the way for many, or in spans. No other test has these sizes, so that none finds its program
# compiled.
FORMS = {
    "prepared": ({}, {}),
    "fused": ({"FILLED": 0}, {"B": 3}),
    "spans": ({"FEWEST_SPANS": 2, "SHORTEST_SPAN": 1}, {"B": 5}),
}
ORACLE_TOKENS = 160  # the oracle is compiled once per recurrence; shorter cases are padded on the right


@dataclass
class Case:
    """Arguments in float64 numpy, and the cotangents of both results."""

    arrays: dict[str, np.ndarray]
    d_out: np.ndarray
    d_state: np.ndarray
    segment_ids: np.ndarray | None = None
    norm_eps: float | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        self.names = tuple(self.arrays)

    @property
    def tokens(self):
        return self.arrays["v"].shape[1]

    def slice(self, start, stop):
        """The same case for tokens [start, stop)."""
        arrays = {n: a if n == "initial_state" else a[:, start:stop] for n, a in self.arrays.items()}
        segments = None if self.segment_ids is None else self.segment_ids[:, start:stop]
        return Case(arrays, self.d_out[:, start:stop], self.d_state, segments, self.norm_eps)


def make_case(name, T=TOKENS, *, B=2, Hq=2, Hk=2, N=2, K=16, V=24, correlation=0.0, rate=1.0, decay=0.2, seed=0):
    """Unit keys with the given pairwise correlation, beta uniform in (rate - 1, rate) but never below 0."""
    rng = np.random.default_rng(seed)
    kind, delta = RECURRENCES[name]

    def unit(heads):
        own, shared = rng.normal(size=(B, T, heads, K)), rng.normal(size=(1, 1, heads, K))
        x = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * shared
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    arrays = {"q": unit(Hq), "k": unit(Hk), "v": rng.normal(size=(B, T, N, V))}
    if kind is not None:
        shape = (B, T, N) if kind == "head" else (B, T, N, K)
        arrays["log_decay"] = -decay * np.abs(rng.normal(size=shape))
    if delta:
        arrays["beta"] = rng.uniform(max(rate - 1, 0), rate, size=(B, T, N))
    arrays["initial_state"] = rng.normal(size=(B, N, K, V))
    return Case(arrays, rng.normal(size=(B, T, max(Hq, N), V)), rng.normal(size=(B, N, K, V)))


@partial(jax.jit, static_argnames=("implementation", "chunk_size", "norm_eps"))
def results_and_gradients(arrays, segment_ids, d_out, d_state, implementation, chunk_size=None, norm_eps=None):
    """((out, state), gradients by name) for the given cotangents."""

    def run(arrays):
        options = {"implementation": implementation, "chunk_size": chunk_size, "norm_eps": norm_eps}
        return linear_attention(**arrays, segment_ids=segment_ids, **options)

    (out, state), pull = jax.vjp(run, arrays)
    return (out, state), pull((d_out.astype(out.dtype), d_state.astype(state.dtype)))[0]


def oracle(case):
    """The token recurrence in float64 and its gradients, as numpy."""
    T = case.tokens
    extra = max(ORACLE_TOKENS - T, 0)

    def pad(x):
        return np.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))

    arrays = {n: a if n == "initial_state" else pad(a) for n, a in case.arrays.items()}
    segments = np.ones(case.d_out.shape[:2], np.int32) if case.segment_ids is None else case.segment_ids
    with jax.enable_x64(True):
        (out, state), gradients = jax.tree.map(
            np.asarray,
            results_and_gradients(
                arrays, pad(segments), pad(case.d_out), case.d_state, "reference", norm_eps=case.norm_eps
            ),
        )
    assert out.dtype == np.float64
    gradients = {n: g if n == "initial_state" else g[:, :T] for n, g in gradients.items()}
    return (out[:, :T], state), gradients


def run(case, implementation, dtype=jnp.float32, chunk_size=None):
    """The case in the given dtype (q, k, v; the rest in float32)."""
    arrays = {n: jnp.asarray(a, dtype if n in ("q", "k", "v") else jnp.float32) for n, a in case.arrays.items()}
    segments = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)
    d_out, d_state = jnp.asarray(case.d_out, jnp.float32), jnp.asarray(case.d_state, jnp.float32)
    return results_and_gradients(arrays, segments, d_out, d_state, implementation, chunk_size, case.norm_eps)


def relative_error(actual, expected):
    """Largest difference over the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.all(np.isfinite(actual))
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def check(actual, expected, forward=1e-5, backward=1e-4):
    """Compares both results and every gradient, one by one."""
    (out, state), gradients = actual
    (out_expected, state_expected), gradients_expected = expected
    assert relative_error(out, out_expected) < forward
    assert relative_error(state, state_expected) < forward
    assert set(gradients) == set(gradients_expected)
    for name, gradient in gradients_expected.items():
        error = relative_error(gradients[name], gradient)
        assert error < backward, f"gradient of {name}: {error:.1e}"


def cosines(case, implementation, run=run):
    """q, k, v and the cotangent in bfloat16: the cosine of each result and gradient with the float64 one, by name."""
    for name in ("q", "k", "v"):
        case.arrays[name] = np.asarray(jnp.asarray(case.arrays[name], jnp.bfloat16), np.float64)
    case.d_out = np.asarray(jnp.asarray(case.d_out, jnp.bfloat16), np.float64)
    (out, state), gradients = run(case, implementation, jnp.bfloat16)
    (out_expected, state_expected), expected = oracle(case)
    assert (out.dtype, state.dtype, gradients["q"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    pairs = {"out": (out, out_expected), "state": (state, state_expected)}
    pairs |= {name: (gradients[name], expected[name]) for name in expected}
    found = {}
    for name, (a, b) in pairs.items():
        a, b = np.asarray(a, np.float64).ravel(), np.asarray(b).ravel()
        found[name] = a @ b / np.sqrt((a @ a) * (b @ b))
    return found


def check_bfloat16(case, implementation, run=run):
    for name, cosine in cosines(case, implementation, run).items():
        assert cosine > LEAST_COSINE, f"{name}: cosine {cosine:.5f}"


class Suite:
    """What the tests use; a fixture hands it out, so that test modules import nothing of one another."""

    recurrences = RECURRENCES
    tokens = TOKENS
    forms = FORMS
    make_case = staticmethod(make_case)
    oracle = staticmethod(oracle)
    run = staticmethod(run)
    relative_error = staticmethod(relative_error)
    check = staticmethod(check)
    check_bfloat16 = staticmethod(check_bfloat16)


@pytest.fixture(scope="session")
def suite():
    return Suite


# What `make test` runs of this folder: the operator's edges, and the recurrence that models use, by every
# implementation. All of it is `make test-kernels`.
QUICK = re.compile(
    r"test_(interface|decode|debug|short_convolution|tpu_branches|emulator|assembled)\.py"
    r"|::test_(results_and_gradients|packed_equals_separate)\[gated_deltanet"
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and not QUICK.search(item.nodeid):
            item.add_marker("kernels")


def pytest_generate_tests(metafunc):
    """Every recurrence and every implementation, where a test asks for them and does not say which."""
    named = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    for fixture, values in (("recurrence", RECURRENCES), ("implementation", IMPLEMENTATIONS)):
        if fixture in metafunc.fixturenames and fixture not in named:
            metafunc.parametrize(fixture, list(values))


def _names(names):
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else names
