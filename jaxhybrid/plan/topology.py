"""TPU slices and GPU nodes as plans see them: what their chips can do, and how they are joined.

TPU figures are Google's per chip; the memory that a program may take of a device is what libtpu 0.0.50 allows. GPU
figures are NVIDIA's data sheets, dense, and of the memory the share that the command line has JAX take. Interconnect is
what a chip sends, and receives, over one link or in all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxhybrid.errors import ConfigError
from jaxhybrid.launch.slices import TPUS, find_slice
from jaxhybrid.model.partition import MESH_AXES, AnyMesh, make_mesh, mesh_sizes


@dataclass(frozen=True)
class Chip:
    """What one chip can do."""

    name: str
    tflops: float  # bfloat16 matrix products
    usable_gib: float  # of a device, for programs
    memory_gbps: float
    link_gbps: float  # one way: of one link of a TPU's torus, of all links of a GPU
    network_gbps: float = 0.0  # one way, to other nodes, of one GPU

    @property
    def kind(self) -> Literal["tpu", "gpu"]:
        return "tpu" if self.name in TPUS else "gpu"

    @property
    def devices(self) -> int:
        """That JAX sees of a chip."""
        return TPUS[self.name].devices_per_chip if self.kind == "tpu" else 1


GPU_SHARE = 0.95  # XLA_PYTHON_CLIENT_MEM_FRACTION, which cli.py sets
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275, 30.75, 1200, 45),
        Chip("v5e", 197, 15.75, 819, 45),
        Chip("v5p", 459, 95.73, 2765, 90),
        Chip("v6e", 918, 31.24, 1638, 90),
        Chip("tpu7x", 2307, 94.74, 7380, 90),
        Chip("h100", 989, GPU_SHARE * 80 * 1e9 / 2**30, 3350, 450, network_gbps=50),
        Chip("h200", 989, GPU_SHARE * 141 * 1e9 / 2**30, 4800, 450, network_gbps=50),
        Chip("b200", 2250, GPU_SHARE * 180 * 1e9 / 2**30, 8000, 900, network_gbps=50),
    )
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice, or GPUs of one or more nodes."""

    name: str
    chip: Chip
    sides: tuple[int, ...]  # chips along each; of GPUs all of them
    node: int  # chips of a host

    @staticmethod
    def parse(name: str) -> "Topology":
        """'v5p:4x4x4', 'h100:16'.

        Raises:
            TopologyError: there is no such slice; names those that there are.
            ConfigError: what its chips can do is not known here.
        """
        found = find_slice(name)
        kind, _, shape = name.partition(":")
        if kind not in CHIPS:
            raise ConfigError(f"--topology {name!r}: plans know {', '.join(CHIPS)}, and not {kind}.")
        sides = tuple(map(int, shape.split("x"))) if found.tpu else (found.devices,)
        return Topology(name, CHIPS[kind], sides, found.per_host)

    def __str__(self) -> str:
        return self.name

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def device_count(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which sides links go round. The compiler must be told: without, it writes other collectives."""
        if len(self.sides) == 2:
            return tuple(side == 16 for side in self.sides)
        return (all(side % 4 == 0 for side in self.sides),) * len(self.sides)

    def mesh(self, sizes: Mapping[str, int]) -> AnyMesh:
        """The mesh of a run on these chips; of GPUs one that has no devices, and that serves for tracing alone.

        Raises:
            TopologyError: the sizes do not multiply to the number of devices.
        """
        if self.chip.kind == "tpu":
            return make_mesh(**sizes, devices=self.devices())
        found = mesh_sizes(sizes, self.device_count)
        # Programs are traced as for a TPU, whose kernels can be traced anywhere and do the same work.
        device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
        kinds = (AxisType.Explicit,) * len(MESH_AXES)
        return AbstractMesh(tuple(found.values()), MESH_AXES, axis_types=kinds, abstract_device=device)

    def devices(self) -> list[Any]:
        """The devices of a slice, described by libtpu; there is no need to have them."""
        from jax.experimental import topologies

        more: dict[str, Any] = {}
        if self.chip.name == "v4":
            more["chip_config_name"] = "megacore"
        if self.chips == 1:
            more["chips_per_host_bounds"] = (1, 1, 1)
        wrap = (*self.wrap, *(False,) * (3 - len(self.sides)))
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(self), wrap=wrap, **more)
        return list(described.devices)

    def links(self, mesh: AnyMesh, axes: Sequence[str]) -> dict[str, float]:
        """How the devices along mesh axes are joined: `gbps` (10^9 bytes a second), what one device receives at a time;
        `link_gbps`, what of it comes from one neighbour; `side`, the most devices of them along a side of the torus."""
        places = _places(mesh) if self.chip.kind == "gpu" else mesh.devices
        group = np.moveaxis(places, [mesh.axis_names.index(axis) for axis in axes], range(len(axes)))
        members = group.reshape(math.prod(mesh.shape[axis] for axis in axes), -1)[:, 0]
        if self.chip.kind == "gpu":
            across = len({place // self.node for place in members}) > 1
            reached = self.chip.network_gbps if across else self.chip.link_gbps
            return {"gbps": reached, "link_gbps": reached, "side": 1}
        spans = [len({device.coords[side] for device in members}) for side in range(len(self.sides))]
        rings = [span == side and wraps for span, side, wraps in zip(spans, self.sides, self.wrap)]
        count = sum(1 + ring for span, ring in zip(spans, rings) if span > 1)
        # The devices of a chip share its links; those of one chip alone have a way of their own, taken as one link.
        link = self.chip.link_gbps / (self.chip.devices if count else 1)
        return {"gbps": max(count, 1) * link, "link_gbps": link, "side": max(spans)}


def _places(mesh: AnyMesh) -> np.ndarray:
    """The numbers of devices in a mesh of GPUs, as `make_mesh` puts them: the last axis the fastest."""
    return np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
