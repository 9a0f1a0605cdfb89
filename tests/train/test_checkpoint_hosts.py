"""Checkpoints and weights of several processes, and checkpoints on another mesh than the one they were made on."""

import json
import os
import socket
import subprocess
import sys
from contextlib import closing

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxhybrid.model.partition import make_mesh
from jaxhybrid.train.checkpoint import Checkpoints
from tests.tiny import write_teacher

SPECS = {"split": ("fsdp", None), "inner": (None, "fsdp"), "whole": (None, None)}


def sharded_state(step, mesh):
    """Arrays that differ from step to step, in every way parameters lie."""

    def array(number, spec):
        values = np.random.default_rng([step, number]).standard_normal((16, 32)).astype(np.float32)
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return {name: array(number, spec) for number, (name, spec) in enumerate(SPECS.items())}


def assert_restored_everywhere(folder, step):
    """Bit by bit, on meshes of three shapes and two numbers of devices."""
    for shape, devices in (({"fsdp": 8}, 8), ({"fsdp": 4, "data": 2}, 8), ({"fsdp": 2}, 2)):
        mesh = make_mesh(**shape, devices=jax.devices()[:devices])
        expected = sharded_state(step, mesh)
        state, _ = Checkpoints(folder).restore(sharded_state(0, mesh))
        for name, value in expected.items():
            assert state[name].sharding == value.sharding
            np.testing.assert_array_equal(state[name], value)


def test_a_checkpoint_is_restored_on_another_mesh(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, sharded_state(3, make_mesh(fsdp=8)), {})
    assert_restored_everywhere(tmp_path, 3)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_stay(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(5):
        checkpoints.save(step, {"x": np.zeros(2)}, {}, wait=True)
    assert checkpoints.steps == list(range(5))[-keep:]


def test_two_processes_take_the_same_checkpoint_and_write_the_same_weights(tmp_path):
    """The newest one is damaged: both go on from the one before."""
    write_teacher(tmp_path / "teacher")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    worker = [sys.executable, "-m", "tests.train.checkpoint_host", str(port)]
    processes = [
        subprocess.Popen([*worker, str(index), tmp_path], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told[0][1][-3000:] + told[1][1][-3000:]
    results = [json.loads(out.rpartition("RESULT")[2]) for out, _ in told]
    assert results == [{"position": {"document": 10}, "same": True, "shards": 12, "warned": 1}] * 2
    # In this process, on any mesh.
    assert_restored_everywhere(tmp_path / "checkpoints", 1)
    given = load_file(tmp_path / "teacher" / "model.safetensors")
    files = list((tmp_path / "written").glob("*.safetensors"))
    written = {name: value for file in files for name, value in load_file(file).items()}
    assert len(files) > 1
    assert written.keys() == given.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(written[name], value)
