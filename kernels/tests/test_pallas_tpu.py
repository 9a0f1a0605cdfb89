"""The TPU kernels, interpreted, against the float64 token recurrence. Several chunks of 128 tokens, odd lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from jaxhybrid_kernels import linear_attention

CASES = {
    "gated, shared keys": ("gated_deltanet", {"N": 4, "Hk": 2, "Hq": 2}),
    "gated, grouped queries": ("gated_deltanet", {"Hq": 4, "B": 1}),
    "correlated keys": ("deltanet", {"correlation": 0.9, "rate": 2.0, "B": 1}),
    "additive, grouped queries": ("linear_attention", {"Hq": 4, "Hk": 1, "B": 1}),
    "strong decay": ("simple_gla", {"decay": 5.0, "B": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_float32(suite, name):
    recurrence, sizes = CASES[name]
    case = suite.make_case(recurrence, 150, **sizes)
    suite.check(suite.run(case, "pallas_tpu"), suite.oracle(case))


@pytest.mark.parametrize("recurrence", ["linear_attention", "simple_gla", "deltanet", "gated_deltanet"])
def test_packed(suite, recurrence):
    case = suite.make_case(recurrence, 150)
    ids = np.repeat([[1, 1, 0, 2, 3, 3, 3, 1, 0, 4]], 15, axis=1)
    case.segment_ids = np.concatenate([ids, ids[:, ::-1]])
    suite.check(suite.run(case, "pallas_tpu"), suite.oracle(case))


@pytest.mark.parametrize("recurrence", ["gated_deltanet", "kimi_delta"])
def test_beta_of_zero(suite, recurrence):
    """The kernels divide by beta for its gradient."""
    case = suite.make_case(recurrence, 150, B=1)
    case.arrays["beta"][:, ::3] = 0
    suite.check(suite.run(case, "pallas_tpu"), suite.oracle(case))


def test_bfloat16(suite):
    case = suite.make_case("gated_deltanet", 150, K=128, V=64, correlation=0.5)
    (out, state), gradients = suite.run(case, "pallas_tpu", jnp.bfloat16)
    (out_expected, state_expected), expected = suite.oracle(case)
    pairs = {n: (gradients[n], expected[n]) for n in expected} | {
        "out": (out, out_expected),
        "state": (state, state_expected),
    }
    for name, (actual, wanted) in pairs.items():
        a, b = np.asarray(actual, np.float64).ravel(), np.asarray(wanted, np.float64).ravel()
        assert a @ b > 0.999 * np.linalg.norm(a) * np.linalg.norm(b), name


def test_refusals():
    q = jnp.zeros((1, 4, 1, 320))
    with pytest.raises(ValueError, match="K=320"):
        linear_attention(q, q, q[..., :64], implementation="pallas_tpu")
    q = q[..., :64]
    with pytest.raises(ValueError, match="chunk_size=64"):
        linear_attention(q, q, q, chunk_size=64, implementation="pallas_tpu")


def test_sharded(suite):
    """Inside shard_map, heads over a mesh axis. The interpreter cannot check varying axes, compiled kernels can."""
    case = suite.make_case("gated_deltanet", 130, B=1)
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, log_decay, beta = (
        jnp.asarray(case.arrays[name], jnp.float32) for name in ("q", "k", "v", "log_decay", "beta")
    )
    heads = PartitionSpec(None, None, "tensor")

    def loss(*arguments):
        out, state = linear_attention(*arguments, implementation="pallas_tpu")
        return lax.psum(jnp.sum(out**2) + jnp.sum(state**2), "tensor")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=heads, out_specs=PartitionSpec(), check_vma=False)
    actual = jax.jit(jax.grad(sharded, argnums=(0, 3, 4)))(q, k, v, log_decay, beta)

    def plain(*arguments):
        out, state = linear_attention(*arguments, implementation="xla")
        return jnp.sum(out**2) + jnp.sum(state**2)

    expected = jax.jit(jax.grad(plain, argnums=(0, 3, 4)))(q, k, v, log_decay, beta)
    for a, b in zip(actual, expected):
        assert suite.relative_error(a, b) < 1e-5
