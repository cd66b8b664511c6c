"""Compiles the whole training for a TPU slice that is not there: python tests/plan.py
--topology=v6e:2x4 [--only=0,update,val] [--top=15] [--csv=PATH] [--key=value of Config ...]

--only compiles just these: stages by number, update (update0 of even steps, update1 of odd ones),
val (or val0, ...); --top is how many kinds of instructions to list, by cost. Needs libtpu and no
TPU. Exit status 0 if the training fits, else 2.
"""

import importlib.util
import os
import re
import signal
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf, isnan, nan, prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
from jax.experimental import topologies

import sharding
import tool
import train_gpt
from hlo import PALLAS, cost
from sharding import InputError

# GiB, what of it the compiler uses, bfloat16 TFLOP/s, GHz, options. From cloud.google.com/tpu/docs;
# GHz are TFLOP/s over 2 x the multipliers: 65536 (v5e), 131072 (v4, v5p), 262144 (v6e).
Chip = namedtuple("Chip", "hbm usable tflops ghz options", defaults=({},))
CHIPS = {
    "v4": Chip(32, 30.75, 275, 1.05, {"chip_config_name": "megacore"}),  # else 2 devices a chip
    "v5e": Chip(16, 15.75, 197, 1.5),
    "v5p": Chip(95, 95, 459, 1.75),
    "v6e": Chip(32, 31.25, 918, 1.75),
}
UTILISATION = 0.4  # of the peak: assumed for Pallas calls
LEGEND = f"""GiB per chip: peak = argument + output - alias + temp + generated_code + resident (what
lies there besides: other programs, optimizer state). GFLOP and GB: loop bodies once.
Mcycles: the compiler's estimates x loop turns. Mcycles*: {PALLAS},
FLOPs at {UTILISATION:.0%} of the peak. Collectives are counted, not timed.
tokens/s and cycles/token: of whole steps, with the mean of the updates of even and odd ones."""


held = lambda tree: sum(  # bytes per device
    prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
)


def slice_of(topology: str) -> tuple[list, Chip]:
    """The devices of a slice such as v5e:2x4. Raises InputError."""
    library, (kind, _, shape) = os.environ.get("TPU_LIBRARY_PATH"), topology.partition(":")
    slices = f"--topology={topology}: no such slice, like v5e:2x4:"
    if kind not in CHIPS:
        raise InputError(f"{slices} chips are {', '.join(CHIPS)}")
    if not (Path(library).exists() if library else importlib.util.find_spec("libtpu")):
        raise InputError(f'no TPU compiler: {sys.executable} -m pip install "jax[tpu]"')
    quiet = {"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_WORKER_HOSTNAMES": "localhost"}  # any will do
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | quiet
    try:
        one = {"chips_per_host_bounds": (1, 1, 1)} if shape in ("1x1", "1x1x1") else {}
        options = {"topology_name": topology, **CHIPS[kind].options, **one}
        return list(topologies.get_topology_desc(platform="tpu", **options).devices), CHIPS[kind]
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{slices} {str(error).splitlines()[0]}") from None


def programs(c, p, mesh) -> dict:
    """name -> function that lowers it, of all programs of train_gpt.train."""
    params, schedule = p.like["params"], c.schedule()

    def rows(n, tokens):
        at = sharding.placed(mesh, ["rows"], [n], "batch")
        return jax.ShapeDtypeStruct((n, tokens + 1), np.uint16, sharding=at)

    n = c.val_tokens // c.val_row_tokens  # as many as data_fineweb.validation takes of them
    if not n:
        raise InputError(f"no row of --val_row_tokens in --val_tokens={c.val_tokens}")
    jobs, val = {}, rows(n // c.rows * c.rows or n, c.val_row_tokens)
    for i in sorted({c.stage(step) for step in range(c.steps)}):
        batch = rows(c.rows, schedule[i][2].tokens // c.rows)
        jobs[str(i)] = partial(p.gradients.lower, params, batch, 0, i)
    jobs |= {f"update{odd}": partial(p.update.lower, p.like, params, odd) for odd in (0, 1)}
    for i in sorted({c.stage(step) for step in [*range(0, c.steps, c.val_every), c.steps]}):
        jobs[f"val{i}"] = partial(p.evaluate.lower, params, val, i)
    return jobs


def measure(name: str, lower, chip: Chip) -> tuple[dict, Counter]:
    """Compiles a program: its row of the table, without what is resident, and its cycles."""
    began, row, cycles = time.perf_counter(), {"program": name, "peak": inf}, Counter()
    try:
        done = lower().compile()
        sizes = done.memory_analysis()
        for part in ("argument", "output", "alias", "temp", "generated_code"):
            row[part] = getattr(sizes, f"{part}_size_in_bytes") / 2**30
        row["peak"] = sum(list(row.values())[2:]) - 2 * row["alias"]
        for unit, of in ("GFLOP", "flops"), ("GB", "bytes accessed"):
            row[unit] = (done.cost_analysis() or {}).get(of, 0) / 1e9
        cycles, moved, notes = cost(done.as_text(), UTILISATION * 1000 * chip.tflops / chip.ghz)
        pallas = sum(n for (_, what, _), n in cycles.items() if what == PALLAS)
        row |= {"Mcycles": (cycles.total() - pallas) / 1e6, "Mcycles*": pallas / 1e6}
        row |= {"ms": cycles.total() / chip.ghz / 1e6, "note": "; ".join(notes)}
        each = (f"{n:g} {kind} of {size / 1e6:.1f} MB" for kind, (n, size) in moved.items())
        row["collectives"] = ", ".join(each)
    except jax.errors.JaxRuntimeError as error:  # libtpu 0.0.51 cannot print some v6e programs
        row |= {"note": str(error).splitlines()[0], "Mcycles": nan, "ms": nan}
        if "RESOURCE_EXHAUSTED" not in str(error) and row["peak"] == inf:
            raise
        if needs := re.search(r"\(([\d.]+)G\) exceeds|Used ([\d.]+)G of", str(error)):
            row["peak"] = float(needs[1] or needs[2])
    row["compile s"] = time.perf_counter() - began
    print(f"compiled {name} in {row['compile s']:.0f} s", flush=True)
    return row, cycles


def finish(c, p, rows: dict):
    """Adds to the rows what depends on other programs: memory, and whole steps of the stages."""
    besides, code = (held(p.like) - held(p.like["params"])) / 2**30, "generated_code"
    updates = [row for name, row in rows.items() if name.startswith("update")]
    mean = lambda key: sum(row.get(key, 0) for row in updates) / max(1, len(updates))
    for row in rows.values():
        row["resident"] = sum(other.get(code, 0) for other in rows.values()) - row.get(code, 0)
        row["resident"] += 0 if row in updates else besides
        row["peak"] += row["resident"]
    for i, (*_, stage) in enumerate(c.schedule()):
        if "Mcycles" in (row := rows.get(str(i), {})):
            cycles = 1e6 * sum(row.get(k, 0) + mean(k) for k in ("Mcycles", "Mcycles*"))
            row["cycles/token"] = cycles / stage.tokens
            row["tokens/s"] = 1000 * stage.tokens / (row.get("ms", 0) + mean("ms"))


def verdict(c, topology: str, chip: Chip, rows: dict, only: str = "") -> str:
    """The last line. A stage that was not compiled counts as the mean of the others."""
    tokens = [(end - start) * stage.tokens for start, end, stage in c.schedule()]
    seen = [(n, rows.get(str(i), {}).get("cycles/token", nan)) for i, n in enumerate(tokens)]
    seen = [(n, each) for n, each in seen if not isnan(each)]
    peak, last = max(row["peak"] for row in rows.values()), ""
    if seen:
        each = sum(n * each for n, each in seen) / sum(n for n, _ in seen)
        seconds = each * sum(tokens) / chip.ghz / 1e9
        last = f", {each:.0f} cycles/token, {seconds:.0f} s to the last step"
    return (
        f"plan: {c.preset} on {topology} {'fits' if peak <= chip.usable else 'does not fit'}: peak"
        f" {peak:.1f} of {chip.hbm:.1f} GiB per chip{last}"
        f" (predicted{f' from {only} alone' if only else ''})"
    )


def table(rows: list[dict]) -> str:
    names = [
        n for n in dict.fromkeys(n for r in rows for n in r) if n not in ("note", "collectives")
    ]
    show = lambda v: v if isinstance(v, str) else f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.2f}"
    text = [names, *([show(row.get(name, "")) for name in names] for row in rows)]
    wide = [max(map(len, column)) for column in zip(*text)]
    return "\n".join("  ".join(word.rjust(n) for word, n in zip(line, wide)) for line in text)


def main(argv: list[str]) -> int:
    keys = tool.keys_of(argv)
    path, topology, only = tool.file_of(keys, "csv"), keys.pop("topology", ""), keys.pop("only", "")
    most, c = train_gpt.typed("top", keys.pop("top", 15), "15"), train_gpt.Config(**keys)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest" if c.float32 else None)
    chips, chip = slice_of(topology)
    try:
        mesh = sharding.make_mesh(c.mesh, chips)
    except AssertionError:  # JAX's, of chips that do not make up a block of the slice
        raise InputError(f"--mesh={c.mesh} is not a block of {topology}") from None
    p = train_gpt.program(c, mesh)
    jobs = programs(c, p, mesh)
    for word in only.split(",") if only else ():
        train_gpt.choose("--only", word, jobs | {"val": 0, "update": 0})
    kind = lambda name: re.sub(r"(?<=[a-z])\d+", "", name)
    names = [n for n in jobs if not only or {n, kind(n)} & {*only.split(",")}]
    with ThreadPoolExecutor(2) as pool:  # more would need much memory
        done = dict(zip(names, pool.map(lambda name: measure(name, jobs[name], chip), names)))
    rows = {name: row for name, (row, _) in done.items()}
    finish(c, p, rows)
    print(table(list(rows.values())), LEGEND, sep="\n")
    for name, (row, cycles) in done.items():
        print(f"{name}: {row.get('collectives') or 'no collectives'}", row.get("note", ""))
        alike = {}  # instructions of one origin, such as a line of every layer, the costliest first
        for (instruction, *kind), n in cycles.most_common():
            alike.setdefault(tuple(kind), []).append((n, instruction))
        for kind, found in sorted(alike.items(), key=lambda item: -sum(n for n, _ in item[1]))[
            :most
        ]:
            total = f"{sum(n for n, _ in found) / 1e6:9.3f} Mcycles {len(found):4d} x"
            print(total, f"{kind[0]:12} {found[0][1]:36} {kind[1]}")
    print(line := verdict(c, topology, chip, rows, only), flush=True)
    tool.write_csv(path, list(rows.values()))
    return 2 if "does not fit" in line else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a compiler would not hear Python's for minutes
    tool.run(main)
