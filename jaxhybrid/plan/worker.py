"""`python -m jaxhybrid.plan.worker ANSWER`: compiles the step of the request on stdin; see `compiler.in_worker`.

A program that was compiled before is not compiled again: its figures are in the cache under its key, whatever else
has changed.
"""

import json
import re
import resource
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxhybrid.errors import JaxHybridError
from jaxhybrid.files import write_json
from jaxhybrid.model.partition import AnyMesh
from jaxhybrid.plan.cache import Cache
from jaxhybrid.plan.compiler import compiler_settings, out_of_memory
from jaxhybrid.plan.program import Program, Request
from jaxhybrid.plan.suggest import ranked
from jaxhybrid.plan.topology import Topology
from jaxhybrid.settings.read import parse_config


def figures(request: Request, topology: Topology, cache: Cache | None = None) -> dict[str, Any]:
    """Of the traced program and, for TPUs and with a cache to keep them in, under `compiled` those of the compiler."""
    mesh = topology.mesh(request.config.mesh.sizes)
    with active(mesh):
        program = Program(request, mesh)
        work = program.work
        found: dict[str, Any] = {
            "mesh": dict(mesh.shape),
            "given": program.given_bytes,
            "held": program.held_bytes,
            "estimate": program.estimated_bytes,
            "exchanges": [asdict(part) | topology.links(mesh, part.axes) for part in program.exchanges],
            "least_received": program.least_received,
            "flops": work.flops,
            "moved": work.moved,
        }
        if cache is not None and isinstance(mesh, Mesh):
            versions = {name: version(name) for name in ("jax", "jaxlib")} | {"libtpu": libtpu_version(mesh)}
            key: dict[str, Any] = {"program": program.key, "topology": str(topology), **versions}
            if settings := compiler_settings():
                key["environment"] = settings
            found["compiled"] = cache.get(key, lambda: compiled_figures(program))
    return found


def active(mesh: AnyMesh) -> AbstractContextManager[Any]:
    """The context in which a program for `mesh` is traced."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


def libtpu_version(mesh: Mesh) -> str:
    """Of the compiler that the mesh's devices come with."""
    told = mesh.devices.flat[0].client.platform_version
    found = re.search(r"Built on .*? cl/\d+", told.replace("\n", " "))
    return found[0] if found else " ".join(told.split())


def compiled_figures(program: Program) -> dict[str, Any]:
    """What the compiler says of memory, in bytes of a device; or what it needs where that is not there."""
    began = time.process_time()
    found: dict[str, Any] = {}
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(str(error))
        if sizes is None:
            raise
        found["out_of_memory"] = {"needed": sizes[0], "available": sizes[1], "text": str(error)[:4000]}
    else:
        memory = compiled.memory_analysis()
        found["memory"] = {
            name.removesuffix("_size_in_bytes").removesuffix("_in_bytes"): getattr(memory, name)
            for name in dir(memory)
            if name.endswith("_in_bytes")
        }
    found["compile_cpu_seconds"] = round(time.process_time() - began, 1)
    found["process_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return found


def main() -> None:
    given = json.load(sys.stdin)
    try:
        topology, kept = Topology.parse(given["topology"]), tuple(given["softmax_layers"])
        request = Request(given["stage"], parse_config(given["config"]), given["teacher"], kept)
        if given["suggest"]:
            answer: dict[str, Any] = {"choices": ranked(request, topology, figures)}
        else:
            answer = figures(request, topology, Cache(Path(given["cache"])))
    except JaxHybridError as error:
        answer = {"error": str(error)}
    write_json(Path(sys.argv[1]), answer)


if __name__ == "__main__":
    main()
