"""Compiles `speedrun` for H100s without one: python tests/gpu_compile.py [0 1 2 3 update0 val0 ...]
[--gpus=8] [--plain] [--fp8 or another key of Config]. Needs `pip install "jax[cuda13]"`. Says what
memory each program takes on a GPU, which kernels of cuDNN and cuBLAS it calls, and what all others
move; neither whether cuDNN takes the sizes nor how fast it is, nor which products XLA times as
faster in Triton: only a GPU can say. --plain: with the attention of GPUs older than an H100."""

import os
import re
import signal
import sys
import time
from collections import Counter
from math import prod
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Else it would time kernels on the GPU; and products that it gave to Triton would have no name.
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
sys.path.insert(0, str(Path(__file__).parent.parent))

from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.experimental import topologies

import hlo
import model
import sharding
import tool
import train_gpt
from plan import held, programs
from sharding import InputError

H100 = """platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 patch: 0 } runtime_version { major: 13 } gpu_device_info {
threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
registers_per_core_limit: 65536 registers_per_block_limit: 65536 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: 84942979072
cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } }"""
NAMES = r"%([\w.-]+)"


def needed(body: dict, users: dict, name: str) -> float:
    """The part of an instruction's elements that a fusion reads, or more where it reads twice."""
    parts, many = {}, lambda type: prod(map(int, re.findall(r"\d+", re.split(r"[][]", type)[1])))
    for j in users.get(name, ()):
        first, part = re.findall(NAMES, j.args)[0] == name, many(j.type) / many(body[name].type)
        if j.op in ("gather", "slice", "dynamic-slice") and first:
            parts[j.type, j.args, j.text.partition("metadata")[0]] = part
        elif j.op == "dynamic-update-slice" and first:
            parts[j.name] = 0
        else:  # as many elements as before: one by one, or in another order
            parts[j.name] = needed(body, users, j.name) if part == 1 and j.op != "reduce" else 1
    return min(1, sum(parts.values())) if parts else 1


def moved(text: str) -> tuple[int, float]:
    """Kernels of a step that are not a library's, and bytes in and out of them, loops multiplied:
    operands and results whole, but of what is only sliced or gathered from, or updated in place,
    as much as is taken or put there.
    """
    module, kernels, total = hlo.parse(text), 0, 0
    types = {i.name: i.type for body in module.values() for i in body}
    for i, times in hlo.walk(module):
        if i.op != "fusion" and not i.op.startswith("copy"):
            continue
        body = module[hlo.called(i, "calls")[0]] if i.op == "fusion" else []
        if any(j.op == "custom-call" for j in body):  # a library's, of a slice: since JAX 0.12
            continue
        users = {p.name: [j for j in body if p.name in re.findall(NAMES, j.args)] for p in body}
        own, args = {p.args: p.name for p in body if p.op == "parameter"}, re.findall(NAMES, i.args)
        written, body = hlo.size(i.type), {j.name: j for j in body}
        for n, arg in enumerate(args):
            part = needed(body, users, own[str(n)]) if body else 1
            total += times * part * hlo.size(types[arg])
            for j in users.get(own.get(str(n)), ()):
                if j.op == "dynamic-update-slice" and re.findall(NAMES, j.args)[0] == own[str(n)]:
                    written += hlo.size(types[re.findall(NAMES, j.args)[1]]) - hlo.size(types[arg])
        kernels, total = kernels + times, total + times * max(written, 0)
    return round(kernels), total


def main(argv: list[str]):
    words = [word for word in argv if not word.startswith("--")]
    keys = {"preset": "speedrun"} | tool.keys_of([word for word in argv if word not in words])
    plain = keys.pop("plain", "false") == "true"
    options = {"topology": f"1x1x{keys.pop('gpus', '8')}", "target_config": H100}
    try:
        devices = topologies.get_topology_desc("", platform="cuda", **options).devices
    except NotImplementedError as error:  # JAX's, of a platform that it has no plugin for
        how = f'{sys.executable} -m pip install "jax[cuda13]"'
        raise InputError(f"no GPU compiler: {how}") from error
    fused.check_compute_capability = lambda capability: True  # these three ask a GPU that is there
    fused.is_cuda_compute_capability_equal = lambda capability: False
    fused.check_cudnn_version = lambda: 91200
    model.trusted = lambda fast, K, dtype: (not plain, "")
    c = train_gpt.Config(**keys)
    mesh = sharding.make_mesh("", devices)
    p = train_gpt.program(c, mesh)
    jobs, sizes = programs(c, p, mesh), (held(p.like), held(p.like["params"]))
    print("{:.2f} GiB of state, {:.2f} GiB of gradients".format(*(n / 2**30 for n in sizes)))
    for word in words or jobs:
        began = time.perf_counter()
        lower = jobs[train_gpt.choose("program", word, jobs)]
        program = lower().compile()
        calls = Counter(re.findall(r'custom_call_target="([^"]*)"', program.as_text()))
        temp = program.memory_analysis().temp_size_in_bytes / 2**30
        kernels, total = moved(program.as_text())
        took = f"compiled in {time.perf_counter() - began:.0f} s"
        others = f"{kernels} other kernels move {total / 1e9:.0f} GB"
        print(f"{word:8} {temp:6.2f} GiB temporary, {took}, {others}, {dict(calls)}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a compiler would not hear Python's for minutes
    tool.run(main)
