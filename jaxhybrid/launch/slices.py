"""What launchers have to know of TPU slices and GPU nodes, by topology name: `v5p:4x4x4`, `h100:16`.

Sources: Google Cloud's pages on TPUs in GKE and on queued resources, as stored in 2025 and 2026. What is here has not
been tried on a cloud.
"""

import math
import re
from dataclasses import dataclass

from jaxhybrid.errors import TopologyError


@dataclass(frozen=True)
class Generation:
    """One kind of TPU."""

    accelerator: str  # node label cloud.google.com/gke-tpu-accelerator
    machine: str  # GKE machine type, before the number of chips of a VM
    torus: int  # dimensions
    most: int  # chips of a slice
    kind: str = ""  # --type of queued resources; none: in GKE only
    runtime: str = ""  # --runtime-version
    devices_per_chip: int = 1


TPUS = {
    "v4": Generation("tpu-v4-podslice", "ct4p-hightpu-", 3, 4096, "v4", "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "ct5lp-hightpu-", 2, 256, "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu-", 3, 6144, "v5p", "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard-", 2, 256, "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": Generation("tpu7x", "tpu7x-standard-", 3, 9216, devices_per_chip=2),
}
GPUS = ("a100", "h100", "h200", "b200")
GPUS_OF_A_NODE = 8
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices of a two-dimensional torus
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of a three-dimensional one, where it is no multiple of 4 on all axes
CHIPS_OF_A_VM = 4  # but where the whole slice is one VM
ONE_VM = {"1x1": 1, "2x2": 4, "2x4": 8, "2x2x1": 4}  # slices of one VM, and its chips


@dataclass(frozen=True)
class Slice:
    """So many accelerators with fast links between them: a TPU slice, or GPU nodes of one cluster."""

    name: str  # v5p:4x4x4
    tpu: Generation | None  # None: GPUs
    shape: str  # 4x4x4 chips; of GPUs 16, or 2x8: nodes x GPUs of a node
    hosts: int
    per_host: int  # chips or GPUs

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.hosts * self.per_host * (self.tpu.devices_per_chip if self.tpu else 1)


def find_slice(name: str) -> Slice:
    """The slice called `name`.

    Raises:
        TopologyError: there is no such slice; names those that there are.
    """
    kind, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
    if kind in GPUS:
        if len(sizes) == 1:
            per_node = min(sizes[0], GPUS_OF_A_NODE)
            sizes = [sizes[0] // per_node, per_node] if sizes[0] % per_node == 0 else []
        if len(sizes) != 2:
            raise TopologyError(
                f"Topology {name!r}: GPUs are so many, in nodes of {GPUS_OF_A_NODE} ({kind}:16), or "
                f"{kind}:NODESxGPUS ({kind}:4x4)."
            )
        return Slice(name, None, shape, *sizes)
    if kind not in TPUS:
        raise TopologyError(f"Topology {name!r} is of no known kind; known are {', '.join((*TPUS, *GPUS))}: v5p:4x4x4.")
    tpu = TPUS[kind]
    if tpu.torus == 2:
        known, exists = ", ".join(FLAT), shape in FLAT
    else:
        known = f"{', '.join(SMALL)}, and multiples of 4 in rising order up to {tpu.most} chips, such as 4x4x8"
        rising = len(sizes) == 3 and sizes == sorted(sizes) and not any(size % 4 for size in sizes)
        exists = shape in SMALL or (rising and math.prod(sizes) <= tpu.most)
    if not exists:
        raise TopologyError(f"Topology {name!r}: there is no such slice of {kind}; there are {known}.")
    per_host = ONE_VM.get(shape, CHIPS_OF_A_VM)
    return Slice(name, tpu, shape, math.prod(sizes) // per_host, per_host)
