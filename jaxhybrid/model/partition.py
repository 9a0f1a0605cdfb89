"""How arrays lie on the mesh: one rules object, and the two moves a forward pass makes.

Parameters and optimizer state are stored sharded over `fsdp`; a block gathers its own weights just before it uses them
(`gather`), and everything that mixes tokens runs per example inside `jax.shard_map` (`per_example`). Gradients of a
gathered weight come back to the weight's shards by the transpose of the gather. Without a mesh both moves do nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.blueprint import Params, is_variable

BATCH_AXES = ("data", "fsdp")  # a batch is split over both; weights only over fsdp
MESH_AXES = ("data", "fsdp", "tensor", "context")


@dataclass(frozen=True)
class ShardingRules:
    """Logical parameter axis -> mesh axis. `tensor` and `context` are named here and refused until they are built."""

    embed: str | None = "fsdp"
    vocab: str | None = None
    heads: str | None = None
    head_dim: str | None = None
    mlp: str | None = None
    layers: str | None = None

    def __post_init__(self) -> None:
        for name, axis in vars(self).items():
            if axis not in (None, "fsdp"):
                raise TopologyError(f"Sharding rule {name} -> {axis!r}: only 'fsdp' or None is supported so far.")

    def spec(self, axes: tuple[str | None, ...]) -> P:
        return P(*(None if axis is None else getattr(self, axis) for axis in axes))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, devices: Any = None) -> Mesh:
    """A mesh of all (or the given) devices; one of `data` and `fsdp` may be -1, for what the other leaves.

    Raises:
        TopologyError: the sizes do not multiply to the device count, or an axis not built yet is asked for.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in (("tensor", tensor), ("context", context)):
        if size != 1:
            raise TopologyError(
                f"mesh.{name}={size}: the {name} axis is not built yet; set it to 1 and use data and fsdp."
            )
    if data == -1 and fsdp == -1:
        raise TopologyError("mesh.data and mesh.fsdp are both -1; only one of them can take the rest.")
    if -1 in (data, fsdp):
        fixed = data if fsdp == -1 else fsdp
        if fixed < 1 or len(devices) % fixed:
            raise TopologyError(f"{len(devices)} devices do not divide by the fixed mesh axis of {fixed}.")
        data, fsdp = (len(devices) // fsdp, fsdp) if data == -1 else (data, len(devices) // data)
    if data * fsdp != len(devices):
        raise TopologyError(f"mesh data={data} x fsdp={fsdp} needs {data * fsdp} devices, there are {len(devices)}.")
    return jax.make_mesh((data, fsdp), BATCH_AXES, axis_types=(AxisType.Explicit,) * 2, devices=devices)


def param_shardings(declared: Params, mesh: Mesh, rules: ShardingRules | None = None) -> Params:
    """A NamedSharding per declared parameter.

    Raises:
        TopologyError: a sharded dimension does not divide over its mesh axis.
    """
    rules = rules or ShardingRules()

    def sharding(path: Any, variable: nnx.Variable) -> NamedSharding:
        shape, partition = variable.shape, rules.spec(variable.out_sharding)
        for size, axis in zip(shape, partition):
            if axis is not None and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise TopologyError(
                    f"{name} {shape}: {size} does not divide over {axis}={mesh.shape[axis]}; "
                    f"choose a divisor of {size}."
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(sharding, declared, is_leaf=is_variable)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis of every batch array over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def _active_mesh() -> Any | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    missing = [axis for axis in BATCH_AXES if axis not in mesh.axis_names]
    if missing:
        raise TopologyError(f"The mesh has axes {mesh.axis_names}; jaxhybrid needs 'data' and 'fsdp' (see make_mesh).")
    for axis, size in mesh.shape.items():
        if axis not in BATCH_AXES and size != 1:
            raise TopologyError(f"Mesh axis {axis!r} has size {size}: only 'data' and 'fsdp' are built; set it to 1.")
    if any(kind != AxisType.Explicit for kind in mesh.axis_types):
        raise TopologyError("The mesh axes must be AxisType.Explicit; build the mesh with jaxhybrid.make_mesh.")
    return mesh


def gather(weights: Any) -> Any:
    """Weights whole on every device, for the computation that follows."""
    if _active_mesh() is None:
        return weights
    with jax.named_scope("gather"):
        return jax.tree.map(lambda w: jax.reshard(w, P(*(None,) * w.ndim)), weights)


def split_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """An array that is the same everywhere, split over the devices as a batch on this axis."""
    return x if _active_mesh() is None else jax.reshard(x, P(*(None,) * axis, BATCH_AXES))


def per_example(fn: Callable[..., Any], *batched: Any, whole: tuple[Any, ...] = ()) -> Any:
    """`fn(*batched, *whole)` on each device's own examples; an absent (None) argument stays absent.

    `batched` arguments and all results carry the batch on their leading axis; `whole` ones are the same on every device
    (their gradient is summed over devices).
    """
    if _active_mesh() is None:
        return fn(*batched, *whole)
    arguments = (*batched, *whole)
    present = [number for number, argument in enumerate(arguments) if argument is not None]

    def local(*given: Any) -> Any:
        # Whole ones are marked as differing between devices: a hand-written gradient may; the transpose sums it.
        found = {
            number: x if number < len(batched) else jax.lax.pcast(x, BATCH_AXES, to="varying")
            for number, x in zip(present, given)
        }
        return fn(*map(found.get, range(len(arguments))))

    in_specs = tuple(P(BATCH_AXES) if number < len(batched) else P() for number in present)
    return jax.shard_map(local, in_specs=in_specs, out_specs=P(BATCH_AXES))(*(arguments[n] for n in present))
