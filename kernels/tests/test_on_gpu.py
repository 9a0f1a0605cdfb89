"""Kernels on a Hopper GPU, by `make test-gpu`: every gradient against the float64 token recurrence.

Those in Triton's form against XLA's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels import float8_swiglu, kl_sums, linear_attention
from jaxhybrid_kernels.gpu import linear_attention as gpu_linear_attention

pytestmark = pytest.mark.gpu

SMALL = {"B": 2, "Hq": 2, "Hk": 2, "N": 2, "K": 64, "V": 64}


@pytest.fixture(params=["prepared", "fused", "spans"])
def forward(request, suite, monkeypatch):
    """Sizes for one form."""
    constants, sizes = suite.forms[request.param]
    for name, value in constants.items():
        monkeypatch.setattr(gpu_linear_attention, name, value)
    return sizes


@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_recurrences_and_widths(suite, recurrence, K, V, forward):
    suite.check_bfloat16(suite.make_case(recurrence, **SMALL | {"K": K, "V": V} | forward), "pallas_gpu")


@pytest.mark.parametrize("T", [2, 17, 63, 64, 65, 127, 128, 129, 512])
def test_lengths(suite, T):
    suite.check_bfloat16(suite.make_case("gated_deltanet", T, **SMALL), "pallas_gpu")


def test_long(suite):
    sizes = {"B": 1, "Hq": 1, "Hk": 1, "N": 1, "K": 128, "V": 128}
    suite.check_bfloat16(suite.make_case("gated_deltanet", 2048, **sizes), "pallas_gpu")


def test_packed_and_padded(suite, recurrence, forward):
    case = suite.make_case(recurrence, **SMALL | forward)
    row = np.repeat([0, 1, 1, 0, 2, 3, 3, 3, 1, 4], 13)
    case.segment_ids = np.stack([np.roll(row, 7 * b) for b in range(case.d_out.shape[0])])
    suite.check_bfloat16(case, "pallas_gpu")


def test_left_padding_equals_none(suite, forward):
    case = suite.make_case("gated_deltanet", 70, **SMALL | forward)
    arrays = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in case.arrays.items()}

    def pad(x):
        return jnp.concatenate([jnp.full_like(x[:, :33], jnp.nan), x], axis=1)

    padded = {n: a if n == "initial_state" else pad(a) for n, a in arrays.items()}
    ids = jnp.ones(case.d_out.shape[:2], jnp.int32)
    ids = jnp.concatenate([jnp.zeros_like(ids[:, :33]), ids], axis=1)
    out, state = linear_attention(**arrays, implementation="pallas_gpu")
    out_padded, state_padded = linear_attention(**padded, segment_ids=ids, implementation="pallas_gpu")
    assert jnp.all(out_padded[:, :33] == 0)
    assert suite.relative_error(out_padded[:, 33:], out) < 0.02
    assert suite.relative_error(state_padded, state) < 0.02


@pytest.mark.parametrize("heads", [(1, 1, 4), (2, 1, 4), (4, 2, 4)], ids=str)
def test_shared_heads(suite, heads):
    Hq, Hk, N = heads
    suite.check_bfloat16(suite.make_case("gated_deltanet", **SMALL | {"Hq": Hq, "Hk": Hk, "N": N}), "pallas_gpu")


@pytest.mark.parametrize(("correlation", "rate"), [(0.9, 1.0), (0.9, 2.0), (0.99, 1.0)])
@pytest.mark.parametrize("recurrence", ["deltanet", "gated_deltanet", "kimi_delta"])
def test_correlated_keys(suite, recurrence, correlation, rate, forward):
    case = suite.make_case(recurrence, **SMALL | forward, correlation=correlation, rate=rate, decay=0.01)
    suite.check_bfloat16(case, "pallas_gpu")


@pytest.mark.parametrize("decay", [0.0, 1e-3, 5.0, 100.0])
@pytest.mark.parametrize("recurrence", ["simple_gla", "gated_deltanet", "gla", "kimi_delta"])
def test_decays(suite, recurrence, decay):
    case = suite.make_case(recurrence, **SMALL, decay=decay)
    if decay == 100.0:  # nothing of what it decays is left, and no gradient of it to compare
        case.d_state[:] = 0
        (out, _), gradients = suite.run(case, "pallas_gpu", jnp.bfloat16)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in (out, *gradients.values()))
        return
    suite.check_bfloat16(case, "pallas_gpu")


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_at_the_ends(suite, beta):
    case = suite.make_case("gated_deltanet", **SMALL)
    case.arrays["beta"][:, ::3] = beta
    suite.check_bfloat16(case, "pallas_gpu")


def test_zero_rows(suite):
    case = suite.make_case("gated_deltanet", **SMALL)
    for name in ("q", "k", "v"):
        case.arrays[name][:, 5::7] = 0
    suite.check_bfloat16(case, "pallas_gpu")


def test_norms(suite, forward):
    case = suite.make_case("gated_deltanet", **SMALL | forward)
    for name in ("q", "k"):
        case.arrays[name] *= np.exp(np.random.default_rng(1).normal(size=(*case.arrays[name].shape[:3], 1)))
        case.arrays[name][:, 5::7] = 0
    case.norm_eps = 1e-6
    suite.check_bfloat16(case, "pallas_gpu")


@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 128)])
def test_same_bits_every_time(suite, recurrence, K, V, forward):
    """A race between the copy engine, the tensor cores and the threads would show as bits that change."""
    case = suite.make_case(recurrence, 1000, **SMALL | {"K": K, "V": V} | forward)
    first = suite.run(case, "pallas_gpu", jnp.bfloat16)
    for _ in range(10):
        again = suite.run(case, "pallas_gpu", jnp.bfloat16)
        assert all(bool(jnp.all(a == b)) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first)))


def test_sums_for_the_kl():
    logits = [8 * jax.random.normal(key, (33, 5000)) for key in jax.random.split(jax.random.key(0))]
    found, expected = (kl_sums(*logits, implementation=form) for form in ("triton", "xla"))
    for name, a, b in zip(found._fields, found, expected):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4, err_msg=name)


def test_swiglu_to_float8():
    keys = jax.random.split(jax.random.key(0), 5)
    gate, up = (jax.random.normal(key, (33, 4500), jnp.bfloat16) for key in keys[:2])
    scales = [0.1 + jax.random.uniform(key, size) for key, size in zip(keys[2:], [(33,), (4500,), (4500,)])]
    (found, scale), (expected, expected_scale) = (
        float8_swiglu(gate, up, *scales, implementation=form) for form in ("triton", "xla")
    )
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-5)
    near = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert np.mean(near[0] == near[1]) > 0.99  # numbers between two of float8 may go the other way
    np.testing.assert_allclose(*near, rtol=0.126, atol=2**-9)
