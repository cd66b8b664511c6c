"""Devices: the processes, the mesh, and the one table that says how every array is split.

Inside `spmd` the program is written for one device (`jax.shard_map`), and the five functions at the
end of this file are all of its communication. They take logical axes, so that the model names what
it adds up, never which devices do it.
"""

import functools
import os

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
# Logical axis of an array -> mesh axes that split it; an axis that is not named here is whole.
RULES = {
    "rows": ("data", "fsdp"),  # batch rows
    "embed": ("fsdp",),  # ZeRO-3: gathered for use, gradients reduce-scattered (arXiv:1910.02054)
    "table": ("fsdp",),
    "vocab": ("tensor",),  # Megatron: heads, hidden units and words are split (arXiv:1909.08053)
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "matrices": MESH_AXES,  # Muon: each device orthogonalises its own matrices
}


class MeshError(ValueError):
    """A layout that does not fit the devices or the model; the message is one line."""


def start_processes():
    """Joins the processes of one job, where there are several; a single host needs nothing.

    Knows torchrun's variables, and what `jax.distributed` finds by itself: SLURM, Open MPI,
    Kubernetes, Cloud TPU pods.
    """
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) > 1:
        address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        local = None if env.get("JAX_PLATFORMS") == "cpu" else [int(env.get("LOCAL_RANK", 0))]
        jax.distributed.initialize(address, int(env["WORLD_SIZE"]), int(env["RANK"]), local)
        return
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETIONS")
    several = any(int(env.get(name) or 1) > 1 for name in counts)
    if several or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def make_mesh(layout: str) -> Mesh:
    """Mesh of `layout`, e.g. "data:2,fsdp:4"; empty is all devices on `fsdp`. Raises MeshError."""
    devices = jax.devices()
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in (layout or f"fsdp:{len(devices)}").split(","):
        name, _, size = part.partition(":")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise MeshError(f"--mesh={layout}: '{part}' is not AXIS:SIZE with AXIS in {MESH_AXES}")
        sizes[name] = int(size)
    count = int(np.prod(list(sizes.values())))
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise MeshError(f"--mesh={layout} is {count} devices, this job has {len(devices)}")
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 3, devices=devices[:count])


def spec(axes) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes, from RULES."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def placed(mesh: Mesh, axes) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def ways(mesh: Mesh, axis: str) -> int:
    """How many parts a logical axis is cut into."""
    return int(np.prod([mesh.shape[name] for name in RULES[axis]]))


def check(mesh: Mesh, name: str, shape, axes):
    """Raises MeshError where a dimension cannot be cut evenly; nothing is padded in silence."""
    for size, axis in zip(shape, axes):
        if axis in RULES and size % ways(mesh, axis):
            raise MeshError(
                f"{name}: {axis} of {size} cannot be split {ways(mesh, axis)} ways"
                f" over {'x'.join(RULES[axis])}; choose another --mesh"
            )


def my_rows(mesh: Mesh, n: int) -> slice:
    """The rows of an n-row batch that this process reads."""
    where = placed(mesh, ["rows"]).devices_indices_map((n,))
    mine = [s[0].indices(n) for d, s in where.items() if d.process_index == jax.process_index()]
    return slice(min(start for start, _, _ in mine), max(stop for _, stop, _ in mine))


def global_rows(mesh: Mesh, local: np.ndarray, n: int) -> jax.Array:
    """Array of n rows in all, from the rows of each process."""
    return jax.make_array_from_process_local_data(
        placed(mesh, ["rows"]), local, (n, *local.shape[1:])
    )


def spmd(f, mesh: Mesh, in_specs, out_specs):
    """`f` as the program of each device; check_vma=False is what Pallas kernels need."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# The rest runs inside `spmd`, and each says what its gradient is.


def total(x, axis: str):
    """Sum over the parts of an axis, whose gradient is summed as well."""
    return lax.psum(x, RULES[axis])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x, names=RULES["heads"]):
    """Identity, where a replicated array goes into work that is split: its gradient is the sum."""
    return x


enter.defvjp(lambda x, names: (x, None), lambda names, _, g: (lax.psum(g, names),))


@jax.custom_vjp
def leave(x):
    """Sum, where split work comes together again: its gradient is already whole."""
    return lax.psum(x, RULES["heads"])


leave.defvjp(lambda x: (leave(x), None), lambda _, g: (g,))


def gather(w, axes):
    """A weight for use: whole over the batch's devices, still split over `tensor`.

    Its gradient comes back summed over all rows and split as the weight is stored, by one
    reduce-scatter in the weight's own dtype.
    """
    stored = [name for axis in axes for name in RULES.get(axis, ())]
    w = enter(w, tuple(name for name in RULES["rows"] if name not in stored))
    for dim, axis in enumerate(axes):
        for name in set(RULES.get(axis, ())) & set(RULES["rows"]):
            w = lax.all_gather(w, name, axis=dim, tiled=True)
    return w


def whole(x, axis: str, dim: int):
    """All parts of `x` along `dim`, on every device."""
    return lax.all_gather(x, RULES[axis], axis=dim, tiled=True)


def own(x, axis: str, dim: int):
    """This device's part of a whole `x` along `dim`."""
    index, parts = part(axis)
    size = x.shape[dim] // parts
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)


def part(axis: str):
    """(index of this device's part, number of parts) of an axis that one mesh axis splits."""
    (name,) = RULES[axis]
    return lax.axis_index(name), lax.axis_size(name)


def spread(mesh: Mesh, stack):
    """Lays a stack of matrices out whole, over all devices; zeros fill it up to even parts."""
    short = -len(stack) % ways(mesh, "matrices")
    stack = jax.numpy.pad(stack, ((0, short), (0, 0), (0, 0)))
    return lax.with_sharding_constraint(stack, placed(mesh, ["matrices"]))
