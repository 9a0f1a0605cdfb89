"""Other meshes, recomputation and accumulation for a stage, ranked by the analytic model; and the fastest that fits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.config import Remat
from jaxhybrid.plan.memory import GIB
from jaxhybrid.plan.program import Request
from jaxhybrid.plan.roofline import roofline
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.run import RunConfig

TENSOR, CONTEXT, PARTS = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Sizes of the mesh's axes; copies (`data`) are for slices joined by a network, and are not tried."""
    for tensor in TENSOR:
        for context in CONTEXT:
            if devices % (tensor * context) == 0:
                yield {"data": 1, "fsdp": devices // (tensor * context), "tensor": tensor, "context": context}


def changed(config: RunConfig, stage: str, sizes: dict[str, int], remat: Remat, parts: int) -> RunConfig:
    """The config with this mesh, and for the stage these settings."""
    settings = getattr(config, stage).model_copy(update={"remat": remat, "gradient_accumulation": parts})
    return config.model_copy(update={"mesh": config.mesh.model_copy(update=sizes), stage: settings})


def ranked(request: Request, topology: Topology, trace: Any) -> list[dict[str, Any]]:
    """Every choice that is estimated to fit, the fastest first: its settings, milliseconds and GiB.

    Of accumulation the least that fits is taken.

    Args:
        trace: (request, topology) -> the figures of the traced program.
    """
    found = []
    policies: tuple[Remat, ...] = ("block",) if request.stage == "align" else get_args(Remat)
    rows = getattr(request.config, request.stage).batch_size
    for sizes in meshes(topology.device_count):
        for remat in policies:
            for parts in PARTS:
                if rows % (parts * sizes["fsdp"]):
                    continue
                config = changed(request.config, request.stage, sizes, remat, parts)
                try:
                    figures = trace(replace(request, config=config), topology)
                except TopologyError:  # heads, width or tokens do not divide
                    break
                gib = (figures["estimate"] + figures["held"]) / GIB
                if gib > topology.chip.usable_gib:
                    continue
                seconds = roofline(figures, topology.chip).expected
                own: dict[str, Any] = {f"mesh.{axis}": size for axis, size in sizes.items()}
                own |= {f"{request.stage}.remat": remat, f"{request.stage}.gradient_accumulation": parts}
                found.append({"settings": own, "milliseconds": 1000 * seconds, "gib": gib})
                break
    return sorted(found, key=lambda choice: choice["milliseconds"])
