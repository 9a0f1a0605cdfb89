"""One measurement of scaling.py, in a process of its own: `scaling_job.py JSON` prints a line of JSON."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stage_steps import CONFIG, StageStep, random_values

from jaxhybrid.families import config_to_hf
from jaxhybrid.measure import peak_memory_bytes
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model, abstract_params
from jaxhybrid.plan.planned import Planned
from jaxhybrid.settings.read import load_config
from jaxhybrid.weights.safetensors import read_table

GIB = 2**30
TEACHERS = CONFIG.parent / "teachers"
SMALL = ModelConfig(
    family="llama", vocab_size=320, hidden_size=256, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=64, norm_eps=1e-5, max_position_embeddings=32768, tie_embeddings=True,
)  # fmt: skip
TINY = replace(SMALL, hidden_size=32, intermediate_size=48, head_dim=8)


def planned_for(shape: str, settings: list[str], length: int) -> Planned:
    """The settings over those of the config, for a teacher of that shape; rows may be longer than it was made for."""
    keys = config_to_hf(TINY) if shape == "tiny" else read_table(TEACHERS / shape / "config.json")
    keys["max_position_embeddings"] = max(length, keys["max_position_embeddings"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(keys))
        return Planned(load_config(str(CONFIG), [f"teacher={folder}", "score.stop_when_stable=null", *settings]))


def step(job: dict[str, Any], planned: Planned, trace: bool = False) -> dict[str, Any]:
    """A stage's step: its median time, tokens a second, model TFLOP/s a GPU, peak memory, loss.

    A token is reckoned as 2 operations for each parameter of what is frozen and 6 of what trains, but for an embedding
    that is not the head as well.
    """
    measured = StageStep.of(job["stage"], planned, job["documents"])
    times = measured.seconds(job["steps"], job["warm"])
    seconds = float(np.median(times[job["warm"] :]))
    settings, devices = getattr(planned.config, job["stage"]), jax.device_count()
    trained, frozen = _parameters(measured.state.params), sum(map(_parameters, measured.rest))
    row = {
        "tokens_per_second": settings.tokens_per_step / seconds,
        "ms": 1e3 * seconds,
        "slowest_ms": 1e3 * max(times[job["warm"] :]),
        "tflops_a_gpu": (6 * trained + 2 * frozen) * settings.tokens_per_step / seconds / devices / 1e12,
        "peak_gib": peak_memory_bytes() / GIB,
        "first_step_s": times[0],
        "loss": measured.take(),
    }
    return row | (_traced(measured, job["steps"]) if trace else {})


def _parameters(tree: Any) -> int:
    if isinstance(tree, dict) and "tokens" in tree:  # a batch
        return 0
    tree = tree.params if isinstance(tree, Model) else tree
    unused = tree["embed"] if isinstance(tree, dict) and {"embed", "head"} <= tree.keys() else ()
    return sum(x.size for x in jax.tree.leaves(tree)) - sum(x.size for x in jax.tree.leaves(unused))


def _traced(measured: StageStep, steps: int) -> dict[str, Any]:
    """Means over the devices, a step."""
    from overlap import collectives

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                measured.take()
        devices = collectives(Path(folder))
    if not devices:
        raise RuntimeError(f"the profile has no kernels of a GPU; it is of {jax.devices()[0].device_kind}")
    kinds = sorted(set().union(*devices))
    names = {kind: sorted(set().union(*(d[kind] for d in devices if kind in d))) for kind in kinds}
    mean = {
        k: {n: sum(d.get(k, {}).get(n, 0) for d in devices) / len(devices) / steps for n in names[k]} for k in kinds
    }
    return {"kinds": mean}


def profile(job: dict[str, Any], planned: Planned) -> dict[str, Any]:
    return step(job, planned, trace=True)


def decode(job: dict[str, Any], planned: Planned) -> dict[str, Any]:
    """One text of a hybrid in bfloat16, by decode_speed.py's machinery."""
    from decode_speed import STEPS, floor_bytes, pretend, seconds_per_call

    from jaxhybrid.decoding.engine import Engine

    params = random_values(abstract_params(planned.hybrid, jax.sharding.get_mesh(), jnp.bfloat16), seed=0)
    engine = Engine(Model(params, planned.hybrid), 1, dtype=jnp.bfloat16, consume=True)
    new = STEPS * (job["steps"] + 2)
    pretend(engine, job["length"] - new, new)
    seconds = seconds_per_call(engine, job["steps"]) / STEPS
    return {
        "ms": 1e3 * seconds,
        "tokens_per_second": 1 / seconds,
        "moved_gb": sum(floor_bytes(engine, job["length"]).values()) / 1e9,
        "peak_gib": peak_memory_bytes() / GIB,
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    planned = planned_for(job["shape"], job["settings"], job["length"])
    mesh = make_mesh(**planned.config.mesh.sizes)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    try:
        with jax.set_mesh(mesh):
            found |= {"step": step, "profile": profile, "decode": decode}[job["work"]](job, planned)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found["out_of_memory"] = str(error).splitlines()[0][:300]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
