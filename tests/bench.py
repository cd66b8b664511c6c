"""Times training steps on the devices at hand: python tests/bench.py [--stage=0] [--profile=DIR]
[--csv=PATH] [--meshes="fsdp:8;data:2,fsdp:4"] [--key=value of Config ...]

With 1, 2, 4, ... rows per device at once, or --device_rows alone; then what each mesh costs.
--profile traces 3 steps for TensorBoard or XProf (pip install xprof). One process, random tokens.
"""

import re
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np

import hlo
import sharding
import tool
import train_gpt
from plan import held, table

# Dense bfloat16 FLOP/s by JAX's device_kind, from the makers' data sheets. H100 and H200 with other
# words behind (PCIe, NVL) are slower than these SXM ones, so they are unknown.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite|TPU v5e": 197e12,
    "TPU v5p?": 459e12,
    "TPU v6 lite|TPU v6e": 918e12,
    "NVIDIA (H100 80GB HBM3|H200)": 989e12,
    "NVIDIA A100-.*": 312e12,
}
peak = lambda kind: next((n for name, n in PEAKS.items() if re.fullmatch(name, kind)), None)
LEGEND = """compile s: both programs, at once, no cache. step ms: median of 10, waited for.
MFU: of the bfloat16 peak, 6 FLOPs per token and matmul parameter, 12 per token, layer, channel
and key in the window. peak GiB: so far (device), or as planned (compiler)."""


def flops_per_token(c, p, stage: int) -> float:
    """Of a training step's products, forward and backward; recomputed ones do not count."""
    s, params = c.schedule()[stage][2], p.like["params"]
    flops = 6 * sum(prod(params[n].shape) for n in ("qkv", "out", "up", "down", "head"))
    for kind in c.layers.split(","):
        T, W = s.tokens // c.rows * (1 + ("p" in kind)), s.long if "l" in kind else s.short
        W = min(W, T - 1)  # the first tokens see fewer
        flops += 0 if "k" in kind else 12 * c.width * (W + 1 - W * (W + 1) / (2 * T))
    return flops


def mfu(tokens_per_second: float, c, p, stage: int, mesh) -> str:
    """Part of the chips' peak that a stage's products take at that speed, or unknown."""
    top = peak(mesh.devices.flat[0].device_kind)
    flops = tokens_per_second * flops_per_token(c, p, stage)
    return f"{flops / top / mesh.size:.1%}" if top else "unknown"


def compiled(c, stage):
    return compiled_of(tuple(vars(c).items()), stage)


@lru_cache(8)  # so that the table of meshes does not compile again
def compiled_of(keys, stage):  # -> program, mesh, rows, compiled gradients and updates, seconds
    c, stage = train_gpt.Config(**dict(keys)), int(stage)
    mesh, (first, _, s) = sharding.make_mesh(c.mesh), c.schedule()[stage]
    p, rng = train_gpt.program(c, mesh), np.random.default_rng(0)
    tokens = rng.integers(0, c.vocab, (c.rows, s.tokens // c.rows + 1), np.uint16)
    tokens[rng.random(tokens.shape) < 1 / 400] = c.bos  # documents of some hundred tokens
    rows = sharding.global_rows(mesh, tokens.shape, tokens.__getitem__)
    began = time.perf_counter()
    jobs = [partial(p.gradients.lower, p.like["params"], rows, first, stage)]
    jobs += [partial(p.update.lower, p.like, p.like["params"], odd) for odd in (0, 1)]
    alone = 1 if "gpu" in p.views[0].chip else None  # as training does: XLA times kernels there
    with ThreadPoolExecutor(alone) as pool:
        programs = list(pool.map(lambda lower: lower().compile(), jobs))
    return p, mesh, rows, programs, time.perf_counter() - began


def memory(p, mesh, programs) -> tuple[float, str]:  # peak GiB of a device, who says so
    stats = [d.memory_stats() or {} for d in mesh.local_devices]
    if all("peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats) / 2**30, "device"
    needs = [held(p.like) - held(p.like["params"]), 0]  # what is no argument of the gradients
    for i, m in enumerate(f.memory_analysis() for f in programs):
        needs[i] += m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        needs[i] -= m.alias_size_in_bytes
    return max(needs) / 2**30, "compiler"


def measure(c, stage: int = 0, profile: str = "") -> dict:
    """A row of the table, with c.device_rows rows per device at once."""
    p, mesh, rows, (gradients, *updates), seconds = compiled(c, stage)
    (first, _, s), times = c.schedule()[stage], []
    state = jax.block_until_ready(p.init(c.seed))
    for i in range(14 if profile else 11):
        if i == 11:
            jax.profiler.start_trace(f"{profile}/stage{stage}-device_rows{c.device_rows}")
        began = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
            _, *grads = gradients(state["params"], rows, first)
            # As in training, no name keeps the gradients.
            state, _ = jax.block_until_ready(updates[i % 2](state, grads.pop()))
        times.append(time.perf_counter() - began)
    if profile:
        jax.profiler.stop_trace()
    steady = statistics.median(times[1:11])  # of an even number: Adam acts in every second step
    speed = s.tokens / steady
    row = {"stage": str(stage), "device_rows": str(c.device_rows), "compile s": seconds}
    row |= {"first ms": 1000 * times[0], "step ms": 1000 * steady, "tokens/s": speed}
    row["MFU"] = mfu(speed, c, p, stage, mesh)
    return row | dict(zip(("peak GiB", "says"), memory(p, mesh, (gradients, updates[1]))))


def layout(c, stage: int) -> list[dict]:
    """What the mesh of c costs a device: bytes of state, and of each kind of collective a step."""
    p, mesh, _, programs, _ = compiled(c, stage)
    moved = [(n, hlo.cost(f.as_text())[1]) for n, f in zip(("gradients", "update"), programs[::2])]
    cells = [(name, kind, n, size / 1e6) for name, m in moved for kind, (n, size) in m.items()]
    row = {"mesh": c.mesh or f"fsdp:{mesh.size}", "state MB": held(p.like) / 1e6}
    return [row | dict(zip(("of", "collective", "count", "MB"), each)) for each in cells] or [row]


def main(argv: list[str]):
    keys = {"preset": "speedrun" if train_gpt.accelerator() else "smoke"} | tool.keys_of(argv)
    path, stage = tool.file_of(keys, "csv"), keys.pop("stage", "0")
    profile, meshes = (keys.pop(name, "") for name in ("profile", "meshes"))
    c, rows, costs = train_gpt.Config(**keys), [], []
    stage = int(train_gpt.choose("--stage", stage, [str(i) for i in range(len(c.schedule()))]))
    train_gpt.start(c)
    jax.config.update("jax_compilation_cache_dir", None)  # compiling is timed, too
    most = max(1, c.rows // sharding.ways(mesh := sharding.make_mesh(c.mesh), "rows"))
    sizes = [c.device_rows] if "device_rows" in keys else [2**i for i in range(most.bit_length())]
    print(f"bench: {c.preset} stage {stage} on {mesh.size} x {jax.devices()[0].device_kind}")
    try:
        for n in sizes:
            rows.append(measure(train_gpt.Config(**vars(c) | {"device_rows": n}), stage, profile))
        for name in meshes.split(";") if meshes else [c.mesh]:
            costs += layout(
                train_gpt.Config(**vars(c) | {"device_rows": sizes[0], "mesh": name}), stage
            )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or not rows:
            raise
        print(f"out of device memory behind device_rows={rows[-1]['device_rows']}")
    print(table(rows), LEGEND, "per device; MB of a step, in or out:", table(costs), sep="\n")
    tool.write_csv(path, rows + costs)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a compiler would not hear Python's for minutes
    tool.run(main)
