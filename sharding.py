"""Devices: the processes, the mesh, and the one table that says how every array is split."""

from argparse import ArgumentTypeError as InputError  # what the user can mend, in one line
from contextlib import suppress
from functools import reduce
from os import environ as env

import jax
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

RULES = {  # logical axis of an array -> mesh axes that split it; one that is not here is whole
    "rows": ("data", "fsdp"),  # of a batch
    "embed": ("fsdp",),  # ZeRO-3: gathered for use, gradients reduce-scattered (arXiv:1910.02054)
    "table": ("fsdp", "tensor"),  # not gathered: a device has its own columns, see lookup
    "matrices": ("fsdp", "tensor", "data"),  # Muon: each device orthogonalises its own
} | dict.fromkeys(["vocab", "heads", "ffn"], ("tensor",))  # Megatron (arXiv:1909.08053)
ROWS = RULES["rows"]
# How `by_rows` cuts an array with these logical axes, and how many parts such an axis has.
part = lambda a=(), on=ROWS: P(*(tuple(n for n in RULES.get(x, ()) if n in on) or None for x in a))
ways = lambda mesh, axis: int(np.prod([mesh.shape[name] for name in RULES.get(axis, ())]))


def start_processes():
    """Joins the processes of a job, by torchrun's variables or what JAX knows: SLURM, TPU pods."""
    env.setdefault("grpc_proxy", "")  # processes of a job reach each other without an HTTP proxy
    jax.config.update("jax_check_proxy_envs", False)  # or JAX would warn of that very variable
    if int(env.get("WORLD_SIZE") or 1) > 1:  # has the GPU LOCAL_RANK, or all if alone on its host
        at = f"{env['MASTER_ADDR']}:{int(env['MASTER_PORT']) + 1}"  # torchrun may listen on it
        names = "WORLD_SIZE", "RANK", "LOCAL_RANK" if env.get("LOCAL_WORLD_SIZE") != "1" else ""
        ids = (env.get(name) and int(env[name]) for name in names)
        return jax.distributed.initialize(at, *ids, cluster_detection_method="deactivate")
    with suppress(ValueError, OSError):  # no job; in Kaggle or a shell of salloc JAX would wait
        if not {("TPU_PROCESS_ADDRESSES", "local"), ("SLURM_STEP_NUM_TASKS", "1")} & env.items():
            jax.distributed.initialize()
        if env.get("SLURM_TASKS_PER_NODE", "").partition("(")[0] == "1":  # JAX takes one GPU
            jax.config.update("jax_cuda_visible_devices", "all")


def make_mesh(layout: str, devices=None) -> Mesh:
    """Mesh of "data:2,fsdp:4", last axes of neighbours; "" is all on fsdp. Raises InputError."""
    devices, names = devices or jax.devices(), ("data", "fsdp", "tensor")
    words = dict(w.partition(":")[::2] for w in (layout or f"fsdp:{len(devices)}").split(","))
    if not words.keys() <= {*names} or not all(n.isdecimal() and int(n) for n in words.values()):
        raise InputError(f"--mesh={layout}: not AXIS:SIZE,AXIS:SIZE with AXIS of {[*names]}")
    sizes = [int(words.get(name, 1)) for name in names]
    if (n := int(np.prod(sizes))) > len(devices) or (n < len(devices) and jax.process_count() > 1):
        raise InputError(f"--mesh={layout} is {n} devices, but there are {len(devices)}")
    grid = create_device_mesh(sizes, devices[:n], allow_split_physical_axes=True)
    return Mesh(grid, names, (AxisType.Auto,) * len(names))


def placed(mesh: Mesh, axes, shape=(), name: str = "") -> NamedSharding:
    """Where such an array lives. Raises InputError for a shape that cannot be cut evenly."""
    for size, axis in zip(shape, axes):
        if size % (n := ways(mesh, axis)):
            raise InputError(f"{name}: {axis} of {size} cannot be split {n} ways by --mesh")
    return NamedSharding(mesh, P(*(RULES.get(axis) for axis in axes)))


def by_rows(mesh: Mesh, f, ins, out):
    """f, written for the rows of one device, on whole arrays; ins and out are from `part`."""
    own = {n for n, size in mesh.shape.items() if n in ROWS or size == 1}  # `tensor` is XLA's
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=out, axis_names=own, check_vma=False)


def gathered(w, axes, dtype):
    """A weight for use, in dtype, whole but for `tensor`: manual here, too, or XLA gathers it."""
    f = lambda w: lax.all_gather(w, "fsdp", axis=axes.index("embed"), tiled=True)
    at, own = part(axes, ["tensor"]), {"tensor"} - {*jax.sharding.get_abstract_mesh().manual_axes}
    f = jax.shard_map(f, in_specs=at, out_specs=at, axis_names=own, check_vma=False) if own else f
    return f(w.astype(dtype)) if "embed" in axes else w  # small ones and tables stay as they are


def summed(g, axes=()):
    """A gradient or loss summed over ROWS that do not split it; XLA fails at size 1 by `tensor`."""
    return lax.psum(g, [n for n in ROWS if n not in str(part(axes)) and lax.axis_size(n) > 1])


def lookup(table, ids_BT, dtype, tpu: bool):
    """Rows (B, T, D) of a table (V, D) with split columns: ids travel, and what was found."""
    rows = table[lax.all_gather(ids_BT, "fsdp")].astype(dtype)  # (fsdp, B, T, D / fsdp)
    if not tpu:  # a TPU is slow at moving columns: there products lay them out, and join them
        return lax.all_to_all(rows, "fsdp", 0, 3, tiled=True)[0]
    where = np.eye(len(rows) * rows.shape[3], dtype=dtype).reshape(*rows.shape[::3], -1)
    rows = with_layout_constraint(rows, Layout((0, 1, 2, 3))) @ np.eye(rows.shape[3], dtype=dtype)
    rows = lax.optimization_barrier(lax.all_to_all(rows, "fsdp", 0, 0))  # else it would move them
    return jax.numpy.einsum("pbtc,pcd->btd", rows, where)


def spread(mesh: Mesh, f, *stacks):
    """f of stacks (..., rows, columns) of matrices, each device having its own whole ones."""
    flat = [x.reshape(-1, *x.shape[-2:]) for x in stacks]
    axes, rest, n = RULES["matrices"], P.UNCONSTRAINED, len(flat[0])
    lay = lambda x, i: lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes[:i], rest, rest)))
    even = (jax.numpy.pad(x, ((0, -n % mesh.size), (0, 0), (0, 0))) for x in flat)
    own = f(*(reduce(lay, (1, 2, 3), x) for x in even))  # one axis at a time, or XLA gathers all
    return [reduce(lay, (3, 2, 1), x)[:n].reshape(z.shape) for x, z in zip(own, stacks)]


def global_rows(mesh: Mesh, shape: tuple, read) -> jax.Array:
    """Rows over the devices, each process making those of its own: read(slice) -> array."""
    at = placed(mesh, ["rows"], shape[:1], "batch")
    return jax.make_array_from_callback(shape, at, lambda index: read(index[0]))
