"""Operands and matrices of decays per channel: code of single lanes, run on numpy, against the interpreter's form."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jaxhybrid_kernels.gpu import channel_runs

_spec = importlib.util.spec_from_file_location("lanes", Path(__file__).with_name("lanes.py"))
lanes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lanes)


class Ref:
    """As much of a reference as the interpreter's form uses."""

    def __init__(self, array):
        self.array = array

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def shape(self):
        return self.array.shape

    @property
    def at(self):
        return _At(self.array)

    def __getitem__(self, _):
        return jnp.asarray(self.array)

    def __setitem__(self, _, value):
        self.array[...] = np.asarray(value)


class _At:
    def __init__(self, array):
        self.array = array

    def __getitem__(self, index):
        if isinstance(index, tuple):
            half, rows = index
            return Ref(self.array[half, rows.start : rows.start + rows.size])
        return Ref(self.array[index])


def swizzled(tile):
    rows = tile.reshape(-1, 8, 8)
    return np.stack([row[np.arange(8) ^ i % 8] for i, row in enumerate(rows)]).reshape(tile.shape)


def put(machine, tile):
    """[...,rows,64] in shared memory, as products read it."""
    *lead, rows, width = tile.shape
    return machine.put(swizzled(tile), (*lead, rows // 8, 1, 8, width))


def by_lane(x):
    """[64,K] -> registers of channel_runs.layout."""
    rows = x.reshape(4, 16, 32, -1)
    registers = [rows[:, i].reshape(128, -1).view(lanes.Vector) for i in range(16)]
    return SimpleNamespace(shape=x.shape, registers=_objects(registers))


def _objects(values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def in_all_lanes(value):
    return SimpleNamespace(registers=np.array(_objects([np.full(128, value)])))


def as_product(x):
    """[64,columns] -> registers of a product's result."""
    columns = x.shape[1]
    tiles = x.reshape(4, 2, 8, columns // 8, 4, 2)  # warp, half, quad, tile, lane of the quad, pair
    registers = np.empty((1, columns // 8, 1, 1, 2, 1, 1, 1, 1), object)
    for tile in range(columns // 8):
        for half in range(2):
            registers[0, tile, 0, 0, half, 0, 0, 0, 0] = tiles[:, half, :, tile].reshape(128, 2).view(lanes.Vector)
    return SimpleNamespace(registers=registers, dtype=x.dtype, layout=None)


@pytest.fixture
def machine(monkeypatch):
    machine = lanes.Machine()
    for name, module in lanes.dialects(machine).items():
        monkeypatch.setattr(channel_runs, name, module)
    monkeypatch.setattr(
        channel_runs.plgpu, "inline_mgpu", lambda **_: lambda emit: lambda *arguments: emit(None, *arguments)
    )
    monkeypatch.setattr(channel_runs.plgpu, "ShapeDtypeStruct", lambda *_, **__: None)
    return machine


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(0.5, 1, shape).astype(dtype)


BF16 = jnp.bfloat16


def operands(K):
    decay, shape = random(64, K), (K // 64, 64, 64)
    return decay, random(*shape, dtype=BF16, seed=1), random(*shape, dtype=BF16, seed=2)


def assert_close(machine, place, expected):
    actual, expected = swizzled(machine.get(place, expected)), expected.astype(np.float32)
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize(("K", "delta"), [(64, True), (128, False), (128, True)])
@pytest.mark.parametrize("size", channel_runs.RUNS)
def test_level(machine, size, K, delta):
    decay, q, k = operands(K)
    totals, tile = Ref(np.zeros((4, K), np.float32)), np.zeros((K // 64, 96, 64), BF16)
    channel_runs.write_totals(jnp.asarray(decay), totals, interpret=True)
    expected = Ref(tile.copy())
    channel_runs.write_level(size, jnp.asarray(decay), Ref(q), Ref(k), totals, expected, delta=True, interpret=True)
    if not delta:
        expected.array[:, 32:64] = 0
    at = [put(machine, q), put(machine, k), machine.put(np.zeros((4, K), np.float32)), put(machine, tile)]
    channel_runs.write_totals(by_lane(decay), at[2], interpret=False)
    np.testing.assert_allclose(machine.get(at[2], totals.array), totals.array, rtol=1e-5)
    channel_runs.write_level(size, by_lane(decay), *at, delta=delta, interpret=False)
    assert_close(machine, at[3], expected.array)


@pytest.mark.parametrize("delta", [False, True])
def test_matrices(machine, delta):
    pair, strict = np.zeros((64, 64), BF16), np.zeros((64, 64), np.float16)
    expected, beta = [Ref(pair.copy()), Ref(strict.copy()) if delta else None], random(64, seed=9)
    at = [put(machine, pair), put(machine, strict) if delta else None]
    for seed, size in enumerate(channel_runs.RUNS):
        products = random(64, 32, seed=seed)
        channel_runs.write_level_matrices(size, jnp.asarray(products), 0.3, Ref(beta), *expected, interpret=True)
        channel_runs.write_level_matrices(size, as_product(products), 0.3, machine.put(beta), *at, interpret=False)
    products = random(64, 64, seed=7)
    channel_runs.write_diagonal(jnp.asarray(products), 0.3, expected[0], interpret=True)
    channel_runs.write_diagonal(as_product(products), 0.3, at[0], interpret=False)
    full = expected[0].array.astype(np.float32)
    assert (np.tril(full) == full).all()
    assert (full + np.triu(np.ones((64, 64)), 1) > 0).all()
    for place, matrix in list(zip(at, expected, strict=True))[: 1 + delta]:
        assert_close(machine, place, matrix.array)


@pytest.mark.parametrize(("K", "delta"), [(64, True), (128, False), (128, True)])
def test_gated(machine, K, delta):
    decay, q, k = operands(K)
    expected = [Ref(x.copy()) for x in (q, k, k, np.zeros(K, np.float32))]
    channel_runs.write_gated(jnp.asarray(decay), 0.3, None, *expected, delta=delta, interpret=True)
    totals = machine.put(decay.reshape(4, 16, K).prod(1))
    at = [*(put(machine, x) for x in (q, k, k)), machine.put(np.zeros(K, np.float32))]
    channel_runs.write_gated(by_lane(decay), 0.3, totals, *at, delta=delta, interpret=False)
    for place, x in zip(at[:3], expected, strict=False):
        assert_close(machine, place, x.array)
    np.testing.assert_allclose(machine.get(at[3], expected[3].array), expected[3].array, rtol=1e-4)


@pytest.mark.parametrize("what", [*({"size": size} for size in channel_runs.RUNS), {}, {"leaving": True}], ids=str)
@pytest.mark.parametrize("kept", [False, True])
def test_factors(machine, what, kept):
    decay, expected = random(64, 64), Ref(np.zeros((64, 64), BF16))
    channel_runs.write_factors(jnp.asarray(decay), None, expected, **what, interpret=True)
    totals, tile = machine.put(decay.reshape(4, 16, 64).prod(1)), put(machine, np.zeros((64, 64), BF16))
    given = by_lane(decay)
    if kept:
        given = channel_runs.keep_decay(given, tuple(put(machine, expected.array) for _ in range(2)), interpret=False)
    channel_runs.write_factors(given, totals, tile, **what, interpret=False)
    assert (expected.array != 0).all()
    assert_close(machine, tile, expected.array)


@pytest.mark.parametrize("reading", [None, False, True])
@pytest.mark.parametrize("size", channel_runs.RUNS)
def test_meeting(machine, size, reading):
    x = random(64, 64, dtype=BF16)
    expected = np.asarray(channel_runs.meeting(size, jnp.asarray(x), reading=reading, interpret=True))
    actual = channel_runs.meeting(in_all_lanes(size), as_product(x), reading=reading, interpret=False)
    for got, wanted in zip(actual.registers.flat, as_product(expected).registers.flat, strict=True):
        np.testing.assert_array_equal(got, wanted)
