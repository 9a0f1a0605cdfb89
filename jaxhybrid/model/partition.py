"""How arrays lie on the mesh, and what devices tell one another inside a forward pass.

One rules object says over which mesh axes parameters, batches and the vocabulary are split. A model's computation runs
on each device's own shards (`on_shards`, a `jax.shard_map`), so that every collective is one that is written here:

    data      replicas: gradients are summed over it
    fsdp      rows of a batch are split over data and fsdp; weights over fsdp and context, and gathered layer by layer
    context   tokens of a row are split over it
    tensor    heads, MLP width and vocabulary are split over it; partial results are summed

Outside, and without a mesh, the functions here that stand for collectives do nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhybrid.errors import TopologyError
from jaxhybrid.model.blueprint import Exact, Params, is_variable

MESH_AXES = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")  # what a batch's rows are split over
BATCH_AXES = (*ROWS, "context")  # over which tokens differ
SHARDS = ("fsdp", "context")  # what weights are split over and gathered from
HOST_MEMORY = "pinned_host"  # memory kind of a sharding whose arrays lie with the host, for its devices to read
AnyMesh = Mesh | AbstractMesh  # without devices it serves for tracing


@dataclass(frozen=True)
class ShardingRules:
    """Logical axis of a parameter -> the mesh axes that split it."""

    embed: tuple[str, ...] = SHARDS
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ()  # each device has its share of every expert
    head_dim: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    def spec(self, shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: dict[str, int], name: str) -> P:
        """How a parameter is split over a mesh of these sizes.

        A vocabulary that does not divide is not split, and K/V heads fewer than the devices are not either: each device
        takes the one that its query heads read (`gather`).

        Raises:
            TopologyError: another dimension does not divide.
        """
        return P(*(self._places(size, axis, sizes, name, shape) for size, axis in zip(shape, axes)))

    def _places(self, size: int, axis: str | None, sizes: dict[str, int], name: str, shape: Any) -> Any:
        places: tuple[str, ...] = getattr(self, axis) if axis else ()
        count = math.prod(sizes[place] for place in places)
        if size % count:
            if axis == "vocab" or (axis == "kv_heads" and count % size == 0):
                return None
            told = " x ".join(f"{place}={sizes[place]}" for place in places if sizes[place] > 1)
            raise TopologyError(f"{name} {shape}: {size} does not divide over {told}; choose divisors of {size}.")
        return (places if len(places) > 1 else places[0]) if places else None


RULES = ShardingRules()


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, devices: Any = None) -> Mesh:
    """A mesh of all (or the given) devices; one of `data` and `fsdp` may be -1, for what the others leave.

    Raises:
        TopologyError: the sizes do not multiply to the device count, or `data` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = mesh_sizes({"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}, len(devices), slices)
    kinds = (AxisType.Explicit,) * len(MESH_AXES)
    return Mesh(_placed(sizes, devices, slices), MESH_AXES, axis_types=kinds)


def mesh_sizes(wanted: Mapping[str, int], devices: int, slices: int = 1) -> dict[str, int]:
    """The sizes of the mesh axes for so many devices in so many slices, -1 filled in; errors as `make_mesh`."""
    sizes = dict(wanted)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or (rest and rest[0] not in ROWS):
        raise TopologyError(f"mesh: {', '.join(rest)} are -1; only one of data and fsdp can take the rest.")
    told = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != -1)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        if fixed < 1 or devices % fixed:
            raise TopologyError(f"{devices} devices do not divide by the {fixed} of mesh {told}.")
        sizes[rest[0]] = devices // fixed
    elif fixed != devices:
        raise TopologyError(
            f"mesh {told} needs {fixed} devices, there are {devices}; fsdp=-1 takes what the others leave."
        )
    if sizes["data"] % slices:
        raise TopologyError(
            f"mesh data={sizes['data']} does not divide over {slices} slices, and no other axis goes over several; use "
            f"a multiple of {slices}."
        )
    return sizes


def check_batch(rows: int, length: int, sizes: Mapping[str, int], microbatches: int = 1) -> None:
    """Refuses a batch of so many rows of `length` tokens that does not divide over mesh axes of these sizes.

    Raises:
        TopologyError: the rows do not divide over microbatches and devices, or the tokens of a row over devices.
    """
    devices, context = math.prod(sizes[axis] for axis in ROWS), sizes["context"]
    if rows % (microbatches * devices):
        raise TopologyError(
            f"batch_size={rows} does not divide over {microbatches} microbatches x {devices} devices of data x fsdp; "
            f"use a multiple of {microbatches * devices}, or give some of the devices to mesh.context."
        )
    if length % context:
        raise TopologyError(f"Rows of {length} tokens do not divide over mesh.context={context}.")


def check_batches(batches: Iterable[tuple[str, int, int, int]], sizes: Mapping[str, int]) -> None:
    """`check_batch` of section, rows, microbatches and tokens of a row each; the error begins with the section."""
    for section, rows, microbatches, length in batches:
        try:
            check_batch(rows, length, sizes, microbatches)
        except TopologyError as error:
            raise TopologyError(f"{section}: {error}") from error


def _placed(sizes: dict[str, int], devices: Any, slices: int) -> np.ndarray:
    """The devices in the shape of the mesh, neighbours near each other; slices of a multislice run along `data`."""
    shape = tuple(sizes.values())
    if slices == 1:  # a mesh axis may be half of one of the torus: 32 x 2 of 4 x 4 x 4
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inside, across = (sizes["data"] // slices, *shape[1:]), (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def own_share(mesh: Any, *axes: str) -> tuple[int, int]:
    """(which, of how many) equal parts along mesh axes this process's devices hold. Processes may hold the same.

    Raises:
        TopologyError: they hold no such part.
    """
    devices = np.moveaxis(mesh.devices, [MESH_AXES.index(axis) for axis in axes], range(len(axes)))
    places = devices.reshape(math.prod(mesh.shape[axis] for axis in axes), -1)
    process = jax.process_index()
    own = [number for number, row in enumerate(places) if any(device.process_index == process for device in row)]
    if not own or len(places) % len(own) or own[0] % len(own) or own != list(range(own[0], own[0] + len(own))):
        raise TopologyError(
            f"Process {process} holds parts {own} of {len(places)} along {axes} of the mesh, no part of equal ones; "
            "choose axes of which one process has a power of two of devices."
        )
    return own[0] // len(own), len(places) // len(own)


# --- how arrays lie


def param_specs(declared: Params, mesh: Any, rules: ShardingRules = RULES) -> Params:
    """A PartitionSpec per declared parameter.

    Raises:
        TopologyError: a dimension does not divide over its mesh axes.
    """

    def spec(path: Any, variable: nnx.Variable) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return rules.spec(variable.shape, variable.out_sharding, dict(mesh.shape), name)

    return jax.tree_util.tree_map_with_path(spec, declared, is_leaf=is_variable)


def param_shardings(declared: Params, mesh: AnyMesh, rules: ShardingRules = RULES) -> Params:
    """A NamedSharding per declared parameter; errors as `param_specs`."""
    return jax.tree.map(partial(NamedSharding, mesh), param_specs(declared, mesh, rules))


def batch_sharding(mesh: AnyMesh, leading: int = 0) -> NamedSharding:
    """Of arrays [B,T,...] (with `leading` axes before them): rows over `data` and `fsdp`, tokens over `context`."""
    return NamedSharding(mesh, P(*(None,) * leading, ROWS, "context"))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B,...] whose rows are whole: over `data`, `fsdp` and `context`."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_spec(x: jax.Array) -> P:
    """How a batch [B,T] is split: as it lies, if by rows alone or by rows and tokens, else by rows and tokens."""
    if active_mesh() is not None:
        spec = jax.typeof(x).sharding.spec
        if spec and spec[0] == BATCH_AXES:
            return P(BATCH_AXES, None)
    return P(ROWS, "context")


def splits_tokens(spec: P) -> bool:
    """Whether the batch that `batch_spec` told this of has the tokens of a row on several devices."""
    return spec != P(BATCH_AXES, None)


def row_devices(mesh: Any) -> int:
    """Devices that whole rows are split over."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def active_specs(declared: Params) -> Params | P:
    """`param_specs` on the active mesh."""
    mesh = active_mesh()
    return P() if mesh is None else param_specs(declared, mesh)


def head_spec(width: int, vocab_size: int) -> P:
    """Of an output head [D,S]."""
    mesh = active_mesh()
    return P() if mesh is None else RULES.spec((width, vocab_size), ("embed", "vocab"), dict(mesh.shape), "head")


def active_mesh() -> Any | None:
    """The mesh that computation is to be spread over; None where there is none, and inside `on_shards`.

    Raises:
        TopologyError: the active mesh is not one of `make_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    if mesh.axis_names != MESH_AXES:
        raise TopologyError(f"The mesh has axes {mesh.axis_names}; jaxhybrid needs {MESH_AXES} (see make_mesh).")
    if any(kind != AxisType.Explicit for kind in mesh.axis_types):
        raise TopologyError("The mesh axes must be AxisType.Explicit; build the mesh with jaxhybrid.make_mesh.")
    return mesh


def on_shards(fn: Callable[..., Any], arguments: tuple[Any, ...], specs: tuple[Any, ...], results: Any) -> Any:
    """`fn(*arguments)` on each device's own shards.

    Args:
        specs: of each argument, a PartitionSpec or a tree of them; the argument is moved where it lies otherwise.
        results: of what `fn` returns.
    """
    if active_mesh() is None:
        return fn(*arguments)
    placed = tuple(jax.tree.map(_moved, _broadcast(spec, x), x) for spec, x in zip(specs, arguments))
    return jax.shard_map(fn, in_specs=specs, out_specs=results)(*placed)


def _broadcast(spec: Any, tree: Any) -> Any:
    return jax.tree.map(lambda own, part: jax.tree.map(lambda _: own, part), spec, tree)


def _moved(spec: P, x: Any) -> Any:
    return x if getattr(jax.typeof(x).sharding, "spec", None) == spec else jax.reshard(x, spec)


def may_offload(x: Any) -> bool:
    """Whether weights are worth it: stacks of matrices. TPUs cannot take a row out of a matrix in the host's memory."""
    return len(x.shape) > 2


def in_memory(kind: str, tree: Any) -> Any:
    """Weights, or their ShapeDtypeStructs, moved to a kind of memory of their devices: `device` or `HOST_MEMORY`."""

    def own(x: Any) -> Any:
        if not may_offload(x):
            return x
        sharding = x.sharding.with_memory_kind(kind)
        return x.update(sharding=sharding) if isinstance(x, jax.ShapeDtypeStruct) else jax.device_put(x, sharding)

    return jax.tree.map(own, tree)


def near(tree: Any) -> Any:
    """The arrays in the devices' own memory: what is offloaded to the host's comes in, the rest stays. Under jit."""
    return _put(tree, jax.tree.map(lambda _: jax.memory.Space.Device, tree))


def lying_as(tree: Any, like: Any) -> Any:
    """The arrays in the memory in which those of `like` lie. Under jit."""
    return _put(tree, jax.tree.map(lambda x: jax.typeof(x).memory_space, like))


def _put(tree: Any, spaces: Any) -> Any:
    return jax.tree.map(lambda x, to: x if jax.typeof(x).memory_space == to else jax.device_put(x, to), tree, spaces)


def repeated(x: jax.Array, repeats: int, axis: int) -> jax.Array:
    """`jnp.repeat`, split over the mesh as x is."""
    sharding = None if active_mesh() is None else jax.typeof(x).sharding
    return jnp.repeat(x, repeats, axis=axis, out_sharding=sharding)


# --- inside `on_shards`


def _in_shards() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AxisType.Manual in mesh.axis_types


def _sizes() -> dict[str, int]:
    return dict(jax.sharding.get_abstract_mesh().shape)


def axis_size(axis: str) -> int:
    """Devices along a mesh axis; 1 outside `on_shards`."""
    return _sizes()[axis] if _in_shards() else 1


def own_heads(heads: int) -> int:
    """Of so many query or K/V heads, how many this device computes."""
    return max(heads // axis_size("tensor"), 1)


def shards() -> int:
    """Devices that a weight is gathered from."""
    return math.prod(map(axis_size, SHARDS))


def axis_index(*axes: str) -> jax.Array:
    """This device's number along mesh axes, the first the slowest."""
    return jax.lax.axis_index(axes) if _in_shards() else jnp.int32(0)


def total(x: jax.Array, *axes: str) -> jax.Array:
    """Summed over mesh axes."""
    return jax.lax.psum(x, axes) if _in_shards() else x


def largest(x: jax.Array, *axes: str) -> jax.Array:
    return jax.lax.pmax(x, axes) if _in_shards() else x


def differing(x: jax.Array, *axes: str) -> jax.Array:
    """x, the same along these mesh axes, marked as one that may differ: the transpose sums over them, in x's dtype."""
    return jax.lax.pcast(x, axes, to="varying") if axes and _in_shards() else x


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying along every manual mesh axis along which any of them does."""
    axes = frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    return [varying_along(x, axes) for x in arrays]


def varying_along(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def joined(x: jax.Array, axis: int, *axes: str) -> jax.Array:
    """The shards of all devices along mesh axes, joined on an array axis."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if _in_shards() else x


def scattered(x: jax.Array, axis: int, *axes: str) -> jax.Array:
    """Summed over mesh axes, of which each device keeps its part of an array axis."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if _in_shards() else x


def permuted(x: jax.Array, axis: str, to: Sequence[int]) -> jax.Array:
    """What the device sent whose number is i, on the device `to[i]` along a mesh axis."""
    return jax.lax.ppermute(x, axis, list(enumerate(to)))


def exchanged(x: jax.Array, split: int, join: int) -> jax.Array:
    """Split on one array axis and joined on another, over the devices that weights are split over."""
    if shards() == 1:
        return x
    return jax.lax.all_to_all(x, SHARDS, split_axis=split, concat_axis=join, tiled=True)


def gather(declared: Params, params: Params, dtype: Any, sums: Any = jnp.float32, marked: bool = False) -> Params:
    """Weights as the computation on this device needs them, in `dtype` (those declared `Exact` as they are).

    They are gathered from the shards in `dtype`; their gradients come back to the shards, summed over devices in
    `sums`. Of K/V heads that are not split over `tensor` the device takes the one that its query heads read.
    `marked`: `mark` was called for them before.
    Shards in the host's memory come in first: of a layer at a time, where this is called in a loop over layers.
    """

    def own(variable: nnx.Variable, x: jax.Array) -> jax.Array:
        axes, kept = variable.out_sharding, x.dtype if isinstance(variable, Exact) else dtype
        if not _in_shards():
            return x.astype(kept)
        if (heads := _shared_heads(variable)) is not None:
            first = axis_index("tensor") * x.shape[heads] // axis_size("tensor")
            x = jax.lax.dynamic_slice_in_dim(x, first, 1, heads)
        if "embed" not in axes or shards() == 1:
            return x.astype(kept)
        return _gathered(x, axes.index("embed"), kept, sums)

    with jax.named_scope("gather"):
        params = near(params)
        return jax.tree.map(own, declared, params if marked else mark(declared, params), is_leaf=is_variable)


def mark(declared: Params, params: Params) -> Params:
    """Weights that are the same on some devices, marked so that their gradients are summed over those."""

    def own(variable: nnx.Variable, x: jax.Array) -> jax.Array:
        split = mesh_axes(RULES.spec(variable.shape, variable.out_sharding, _sizes(), ""))
        # What `tensor` does not split makes or takes the whole width, and every device has its whole gradient.
        is_whole = "embed" in variable.out_sharding and _shared_heads(variable) is None
        alike = [axis for axis in MESH_AXES if axis not in split and not (is_whole and axis == "tensor")]
        return differing(x, *alike)

    return jax.tree.map(own, declared, params, is_leaf=is_variable) if _in_shards() else params


def _shared_heads(variable: nnx.Variable) -> int | None:
    """The axis of K/V heads that are fewer than the devices of `tensor`, if there is one."""
    axes = variable.out_sharding
    heads = axes.index("kv_heads") if "kv_heads" in axes else None
    return heads if heads is not None and variable.shape[heads] % axis_size("tensor") else None


def mesh_axes(spec: P) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec names."""
    return tuple(axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: jax.Array, axis: int, dtype: Any, sums: Any) -> jax.Array:
    return jax.lax.all_gather(x.astype(dtype), SHARDS, axis=axis, tiled=True)


def _scattered(axis: int, dtype: Any, sums: Any, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = gradient.astype(jnp.promote_types(sums, gradient.dtype))
    return (jax.lax.psum_scatter(wide, SHARDS, scatter_dimension=axis, tiled=True).astype(like.dtype),)


_gathered.defvjp(lambda x, axis, dtype, sums: (_gathered(x, axis, dtype, sums), x[:0]), _scattered)
