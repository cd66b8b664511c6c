"""Devices: the processes, the mesh, and the one table that says how every array is split."""

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Logical axis of an array -> mesh axes that split it; an axis that is not named here is whole.
RULES = {
    "rows": ("data", "fsdp"),  # of a batch
    "embed": ("fsdp",),  # ZeRO-3: gathered for use, gradients reduce-scattered (arXiv:1910.02054)
    "table": ("fsdp", "tensor"),
    "matrices": ("data", "fsdp", "tensor"),  # Muon: each device orthogonalises its own
} | dict.fromkeys(["vocab", "heads", "ffn"], ("tensor",))  # Megatron (arXiv:1909.08053)
ROWS = RULES["rows"]
# How `by_rows` cuts an array with these logical axes, and how many parts such an axis has.
part = lambda axes=(): P(*(tuple(n for n in RULES.get(a, ()) if n in ROWS) or None for a in axes))
ways = lambda mesh, axis: int(np.prod([mesh.shape[name] for name in RULES.get(axis, ())]))


class InputError(ValueError):
    """Something that the user can mend, in one line."""


def make_mesh(layout: str, devices=None) -> Mesh:
    """Mesh of `layout`, e.g. "data:2,fsdp:4"; empty is all devices on fsdp. Raises InputError."""
    devices, sizes = devices or jax.devices(), dict.fromkeys(RULES["matrices"], 1)
    for word in (layout or f"fsdp:{len(devices)}").split(","):
        name, _, size = word.partition(":")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise InputError(f"--mesh={layout}: '{word}' is not AXIS:SIZE, AXIS of {list(sizes)}")
        sizes[name] = int(size)
    n, kinds = int(np.prod(list(sizes.values()))), (AxisType.Auto,) * len(sizes)
    if n > len(devices) or (n < len(devices) and jax.process_count() > 1):
        raise InputError(f"--mesh={layout} is {n} devices, but there are {len(devices)}")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices[:n])


def placed(mesh: Mesh, axes, shape=(), name: str = "") -> NamedSharding:
    """Where such an array lives. Raises InputError for a shape that cannot be cut evenly."""
    for size, axis in zip(shape, axes):
        if size % (n := ways(mesh, axis)):
            raise InputError(f"{name}: {axis} of {size} cannot be split {n} ways by --mesh")
    return NamedSharding(mesh, P(*(RULES.get(axis) for axis in axes)))


def by_rows(mesh: Mesh, f, ins, outs):
    """f, written for the rows of one device, on whole arrays; ins and outs are from `part`."""
    # Reduce-scatter and Pallas need these axes to be ours; `tensor` is XLA's.
    ours = {name for name, size in mesh.shape.items() if name in ROWS or size == 1}
    options = {"axis_names": ours, "check_vma": False}
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, **options)


def gathered(w, axes):
    """A weight for use: whole but for `tensor`; its gradient is reduce-scattered, in w's dtype."""
    for i, axis in enumerate(axes):
        w = lax.all_gather(w, "fsdp", axis=i, tiled=True) if axis == "embed" else w
    return w


def summed(g, axes=()):
    """A gradient, or a loss, of this device's rows summed over all rows."""
    return lax.psum(g, [n for n in ROWS if all(n not in RULES.get(axis, ()) for axis in axes)])


def lookup(table, ids_BT, dtype):
    """Rows (B, T, D) of a table (V, D) with split columns: ids travel, and what was found."""
    found = table[lax.all_gather(ids_BT, "fsdp")].astype(dtype)  # (fsdp, B, T, D / fsdp)
    n, width = len(found), found.shape[-1]
    where = np.eye(n * width, dtype=dtype).reshape(n, width, -1)  # TPUs are slow at moving columns
    return jax.numpy.einsum("pbtc,pcd->btd", lax.all_to_all(found, "fsdp", 0, 0), where)


def spread(mesh: Mesh, stack):
    """Lays a stack of matrices out whole, over all devices; zeros fill it up to even parts."""
    stack = jax.numpy.pad(stack, ((0, -len(stack) % mesh.size), (0, 0), (0, 0)))
    return lax.with_sharding_constraint(stack, placed(mesh, ["matrices"]))


def global_rows(mesh: Mesh, n: int, read) -> jax.Array:
    """n rows over the devices, each process making its own: read(first, count) -> array."""
    at = placed(mesh, ["rows"], [n], "batch")
    cuts = [s[0].indices(n) for s in at.addressable_devices_indices_map((n,)).values()]
    first, stop = min(cut[0] for cut in cuts), max(cut[1] for cut in cuts)
    local = read(first, stop - first)
    return jax.make_array_from_process_local_data(at, local, (n, *local.shape[1:]))
