"""Which slices exist, and how their chips are joined."""

import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxhybrid.errors import JaxHybridError
from jaxhybrid.model.partition import MESH_AXES
from jaxhybrid.plan.topology import CHIPS, GPU_SHARE, Topology


@pytest.mark.parametrize(
    ("text", "chips", "devices", "wrap"),
    [
        ("v5p:4x4x4", 64, 64, (True, True, True)),
        ("v5p:2x2x1", 4, 4, (False, False, False)),
        ("v5p:2x4x4", 32, 32, (False, False, False)),
        ("tpu7x:4x4x8", 128, 256, (True, True, True)),
        ("v6e:8x16", 128, 128, (False, True)),
        ("v5e:1x1", 1, 1, (False, False)),
        ("v5e:16x16", 256, 256, (True, True)),
    ],
)
def test_slices_that_exist(text, chips, devices, wrap):
    topology = Topology.parse(text)
    assert (topology.chips, topology.device_count, topology.wrap, str(topology)) == (chips, devices, wrap, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v5e:32x16", "no such slice of v5e; there are 1x1, 2x2"),
        ("v5p:4x4x6", "multiples of 4 in rising order"),
        ("v5p-128", "of no known kind; known are v4, v5e"),
        ("a100:8", "plans know v4, v5e, v5p, v6e, tpu7x, h100, h200, b200, and not a100"),
    ],
)
def test_others_are_refused_with_those_that_there_are(text, told):
    with pytest.raises(JaxHybridError, match=re.escape(told)):
        Topology.parse(text)


def mesh_on(topology, shape):
    """A mesh whose devices lie in the order of their coordinates."""
    places = np.ndindex(*topology.sides)
    devices = np.empty(topology.chips, object)
    devices[:] = [SimpleNamespace(coords=place) for place in places]
    sizes = dict(zip(MESH_AXES, shape))
    return SimpleNamespace(devices=devices.reshape(shape), axis_names=MESH_AXES, shape=sizes)


def test_links_of_a_torus():
    topology, link = Topology.parse("v5p:4x4x4"), CHIPS["v5p"].link_gbps
    mesh = mesh_on(topology, (1, 16, 1, 4))
    assert topology.links(mesh, ["fsdp", "context"]) == {"gbps": 6 * link, "link_gbps": link, "side": 4}  # three rings
    assert topology.links(mesh, ["fsdp"]) == {"gbps": 4 * link, "link_gbps": link, "side": 4}
    assert topology.links(mesh, ["context"]) == {"gbps": 2 * link, "link_gbps": link, "side": 4}
    half = mesh_on(topology, (1, 32, 1, 2))  # two of the four of a ring: one link
    assert topology.links(half, ["context"]) == {"gbps": link, "link_gbps": link, "side": 2}
    open_ended = Topology.parse("v5p:2x2x1")  # nothing goes round
    found = open_ended.links(mesh_on(open_ended, (1, 4, 1, 1)), ["fsdp"])
    assert found == {"gbps": 2 * link, "link_gbps": link, "side": 2}


def test_gpus_have_the_memory_that_the_command_line_lets_jax_take(monkeypatch):
    """In a process of its own: it has to be set before JAX looks for devices."""
    code = (
        "import os, sys; from jaxhybrid import cli\n"
        "cli.app = lambda: print(os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'], 'jax' in sys.modules)\n"
        "cli.main()"
    )
    for given, told in ((None, f"{GPU_SHARE} False"), ("0.5", "0.5 False")):
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
        if given:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", given)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == told


def test_two_devices_of_a_chip_share_its_links():
    topology, link = Topology.parse("tpu7x:4x4x4"), CHIPS["tpu7x"].link_gbps
    devices = np.empty(128, object)
    devices[:] = [SimpleNamespace(coords=place) for place in np.ndindex(4, 4, 4) for _ in range(2)]
    sizes = dict(zip(MESH_AXES, shape := (1, 16, 4, 2)))
    mesh = SimpleNamespace(devices=devices.reshape(shape), axis_names=MESH_AXES, shape=sizes)
    ring = {"gbps": 2 * link / 2, "link_gbps": link / 2, "side": 4}
    assert topology.links(mesh, ["fsdp"]) == ring | {"gbps": 4 * link / 2}  # two rings
    assert topology.links(mesh, ["tensor"]) == ring
    assert topology.links(mesh, ["tensor", "context"]) == ring  # all devices of it
    assert topology.links(mesh, ["context"]) == {"gbps": link, "link_gbps": link, "side": 1}  # within a chip


def test_gpus_of_several_nodes_meet_over_the_network():
    topology, chip = Topology.parse("h100:16"), CHIPS["h100"]
    mesh = topology.mesh({"data": 2, "fsdp": 8, "tensor": 1, "context": 1})
    assert topology.links(mesh, ["fsdp"])["gbps"] == chip.link_gbps
    assert topology.links(mesh, ["data"])["gbps"] == chip.network_gbps
