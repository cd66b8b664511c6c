"""Devices: the processes, the mesh, and the one table that says how every array is split.

Inside `spmd` the program is written for one device, and the functions at the end of this file are
all of its communication. They take logical axes: the model names what it adds up, not where.
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
    "rows": ("data", "fsdp"),  # of a batch
    "embed": ("fsdp",),  # ZeRO-3: gathered for use, gradients reduce-scattered (arXiv:1910.02054)
    "table": ("fsdp",),
    "vocab": ("tensor",),  # Megatron: words, heads, hidden units are split (arXiv:1909.08053)
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "matrices": MESH_AXES,  # Muon: each device orthogonalises its own matrices
}


class MeshError(ValueError):
    """A layout that does not fit the devices or the model, in one line."""


def start_processes():
    """Joins the processes of one job, where there are several; a single host needs nothing.

    Knows torchrun's variables, and what `jax.distributed` finds by itself: SLURM, Open MPI,
    Kubernetes, Cloud TPU pods.
    """
    env, counts = os.environ, ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETIONS")
    n, cpu = int(env.get("WORLD_SIZE", 1)), jax.config.jax_platforms == "cpu"
    if n > 1:
        local = None if cpu else [int(env.get("LOCAL_RANK", 0))]  # one process per GPU
        address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        jax.distributed.initialize(address, n, int(env["RANK"]), local)
    elif max(int(env.get(name) or 1) for name in counts) > 1:
        jax.distributed.initialize()
    elif "," in env.get("TPU_WORKER_HOSTNAMES", "") and not cpu:
        jax.distributed.initialize()


def make_mesh(layout: str) -> Mesh:
    """Mesh of `layout`, e.g. "data:2,fsdp:4"; empty is all devices on fsdp. Raises MeshError."""
    devices, sizes = jax.devices(), dict.fromkeys(MESH_AXES, 1)
    for word in (layout or f"fsdp:{len(devices)}").split(","):
        name, _, size = word.partition(":")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise MeshError(f"--mesh={layout}: '{word}' is not AXIS:SIZE, AXIS of {MESH_AXES}")
        sizes[name] = int(size)
    count = int(np.prod(list(sizes.values())))
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise MeshError(f"--mesh={layout} is {count} devices, but there are {len(devices)}")
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, kinds, devices=devices[:count])


def spec(axes) -> PartitionSpec:
    """How an array with these logical axes is split."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def placed(mesh: Mesh, axes) -> NamedSharding:
    return NamedSharding(mesh, spec(axes))


def ways(mesh: Mesh, axis: str) -> int:
    """How many parts a logical axis is cut into."""
    return int(np.prod([mesh.shape[name] for name in RULES.get(axis, ())]))


def check(mesh: Mesh, name: str, shape, axes):
    """Raises MeshError where a dimension cannot be cut evenly: nothing is padded in silence."""
    for size, axis in zip(shape, axes):
        n = ways(mesh, axis)
        if size % n:
            raise MeshError(f"{name}: {axis} of {size} cannot be split {n} ways: choose --mesh")


def global_rows(mesh: Mesh, n: int, read) -> jax.Array:
    """n rows over the devices, of which each process makes its own: read(first, count)."""
    at = placed(mesh, ["rows"])
    cuts = [s[0].indices(n) for s in at.addressable_devices_indices_map((n,)).values()]
    first, stop = min(cut[0] for cut in cuts), max(cut[1] for cut in cuts)
    local = read(first, stop - first)
    return jax.make_array_from_process_local_data(at, local, (n, *local.shape[1:]))


def spread(mesh: Mesh, stack):
    """Lays a stack of matrices out whole, over all devices; zeros fill it up to even parts."""
    stack = jax.numpy.pad(stack, ((0, -len(stack) % ways(mesh, "matrices")), (0, 0), (0, 0)))
    return lax.with_sharding_constraint(stack, placed(mesh, ["matrices"]))


# One program per device. Pallas kernels need check_vma=False, so the rest states its gradients.
spmd = functools.partial(jax.shard_map, check_vma=False)


def total(x, axis: str):
    """Sum over the parts of an axis; so is its gradient."""
    return lax.psum(x, RULES[axis])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x, names=RULES["heads"]):
    """Identity, where a whole array goes into split work: its gradient is the parts' sum."""
    return x


enter.defvjp(lambda x, names: (x, None), lambda names, _, g: (lax.psum(g, names),))


@jax.custom_vjp
def leave(x):
    """Sum, where split work comes together again: its gradient is whole already."""
    return lax.psum(x, RULES["heads"])


leave.defvjp(lambda x: (leave(x), None), lambda _, g: (g,))


def gather(w, axes):
    """A weight for use: whole but for `tensor`. Its gradient comes back summed over all rows and
    split as the weight is stored, by one reduce-scatter in the weight's own dtype.
    """
    stored = [name for axis in axes for name in RULES.get(axis, ())]
    w = enter(w, tuple(name for name in RULES["rows"] if name not in stored))
    for dim, axis in enumerate(axes):
        if RULES.get(axis) == ("fsdp",):
            w = lax.all_gather(w, "fsdp", axis=dim, tiled=True)
    return w


def part(axis: str) -> tuple:
    """(index of this device's part, number of parts) of an axis."""
    return lax.axis_index(RULES[axis]), lax.axis_size(RULES[axis])


def whole(x, axis: str, dim: int):
    """All parts of `x` along `dim`, on every device."""
    return lax.all_gather(x, RULES[axis], axis=dim, tiled=True)


def own(x, axis: str, dim: int):
    """This device's part of a whole `x` along `dim`."""
    index, parts = part(axis)
    size = x.shape[dim] // parts
    return lax.dynamic_slice_in_dim(x, index * size, size, dim)
