"""Queries and keys divided by their norms: by XLA, and inside the TPU kernels of the delta rule."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxhybrid_kernels import context_linear_attention, decode, linear_attention, linear_attention_step

EPS = 1e-6


def make_case(suite, recurrence, T=150, **sizes):
    """Queries and keys of very different lengths, some zero."""
    case = suite.make_case(recurrence, T, **sizes)
    rng = np.random.default_rng(1)
    for name in ("q", "k"):
        x = case.arrays[name]
        x *= np.exp(2 * rng.normal(size=(*x.shape[:3], 1)))
        x[:, 20:24] = 0
    case.norm_eps = EPS
    return case


def test_reference(suite):
    """It is what its definition says, in float64."""
    case = make_case(suite, "gated_deltanet", 40)
    (out, state), _ = suite.oracle(case)
    for name in ("q", "k"):
        x = case.arrays[name]
        case.arrays[name] = x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + EPS)
    case.norm_eps = None
    (out_expected, state_expected), _ = suite.oracle(case)
    assert suite.relative_error(out, out_expected) < 1e-12
    assert suite.relative_error(state, state_expected) < 1e-12


@pytest.mark.parametrize(
    ("recurrence", "implementation", "heads"),
    [
        ("linear_attention", "pallas_tpu", {}),
        ("gated_deltanet", "xla", {}),
        ("gated_deltanet", "recurrent", {}),
        ("gated_deltanet", "pallas_tpu", {"N": 4, "Hk": 2, "Hq": 2}),
        ("gated_deltanet", "pallas_tpu", {"Hq": 4}),
        ("deltanet", "pallas_tpu", {"B": 1}),
        ("kimi_delta", "pallas_tpu", {"B": 1}),
    ],
)
def test_results_and_gradients(suite, recurrence, implementation, heads):
    case = make_case(suite, recurrence, **heads)
    suite.check(suite.run(case, implementation), suite.oracle(case))


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_packed(suite, implementation):
    """Padding may hold anything: what it holds reaches no result and no gradient."""
    case = make_case(suite, "gated_deltanet")
    ids = np.repeat([[1, 1, 0, 2, 3, 3, 3, 1, 0, 4]], 15, axis=1)
    case.segment_ids = np.concatenate([ids, ids[:, ::-1]])
    expected = suite.oracle(case)
    for name in ("q", "k", "v"):
        case.arrays[name][case.segment_ids == 0] = np.nan
    suite.check(suite.run(case, implementation), expected)


@pytest.mark.parametrize("recurrence", ["gated_deltanet", "kimi_delta"])
def test_bfloat16(suite, recurrence):
    case = make_case(suite, recurrence, B=1, K=64, V=64, correlation=0.9, decay=0.05)
    suite.check_bfloat16(case, "pallas_tpu")


def test_decoding(suite):
    case = make_case(suite, "gated_deltanet", 30)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
    state = arrays.pop("initial_state")
    out, last = linear_attention(**arrays, initial_state=state, norm_eps=EPS, implementation="xla")
    few = {name: x[:, :24] for name, x in arrays.items()}
    outs, state = decode.linear_attention_steps(**few, state=state, norm_eps=EPS)
    assert suite.relative_error(outs, out[:, :24]) < 1e-5
    for t in range(24, 30):
        one, state = linear_attention_step(**{name: x[:, t] for name, x in arrays.items()}, state=state, norm_eps=EPS)
        assert suite.relative_error(one, out[:, t]) < 1e-5
    assert suite.relative_error(state, last) < 1e-5


@pytest.mark.parametrize("recurrence", ["linear_attention", "gated_deltanet"])
def test_sharded_sequence(suite, recurrence):
    case = make_case(suite, recurrence, 64)
    names = [name for name in case.names if name != "initial_state"]
    arrays = [jnp.asarray(case.arrays[name], jnp.float32) for name in names]
    mesh, tokens = jax.make_mesh((8,), ("context",)), P(None, "context")

    def shard(*arrays):
        return context_linear_attention(**dict(zip(names, arrays)), norm_eps=EPS, axis_name="context")

    def loss(operator, *arrays):
        return sum(jnp.sum(jnp.sin(x)) for x in operator(*arrays))

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=tokens, out_specs=(tokens, P()))

    def whole(*arrays):
        return linear_attention(**dict(zip(names, arrays)), norm_eps=EPS, implementation="xla")

    every = tuple(range(len(names)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, jax.NamedSharding(mesh, tokens))
        actual = jax.jit(jax.grad(partial(loss, sharded), every))(*placed)
    for name, a, b in zip(names, actual, jax.jit(jax.grad(partial(loss, whole), every))(*arrays)):
        assert suite.relative_error(a, b) < 1e-4, name


@pytest.mark.parametrize("norm_eps", [0.0, -1.0, "1e-6", float("nan")])
def test_refusals(norm_eps):
    q = jnp.zeros((1, 4, 1, 16))
    with pytest.raises(ValueError, match=f"norm_eps={norm_eps!r}"):
        linear_attention(q, q, q, norm_eps=norm_eps)
