"""JAX against PyTorch on this machine: python tests/bench_torch.py [--torch_python=PATH
--csv=FILE --svg=FILE]; --help has all keys. Prints a table; FILEs get it as CSV, or as a picture.

The same blocks (norm, causal attention, ReLU^2 MLP, residual) from the same numbers, on the CPU in
float32; on a GPU it is --device=cuda --dtype=bfloat16 (of the products; weights stay float32). This
project does not need PyTorch: PATH is a Python that has it, if this one has not.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np

SIDES = {"jax": "#4285f4", "torch eager": "#f9ab00", "torch compile": "#ea4335"}
DEFAULTS = {"batches": "1,4,16", "tokens": 256, "width": 256, "heads": 4, "layers": 4, "steps": 20}
DEFAULTS |= {"torch_python": sys.executable, "csv": "", "svg": "", "side": ""}
DEFAULTS |= {"device": "cpu", "dtype": "float32"}
HELP = {"csv": "where to write the table, as CSV", "svg": "where to draw tokens/s, as SVG"}
HELP |= {"side": "for itself: measures one side", "torch_python": "a Python that has PyTorch"}
HELP |= {"device": "cpu or cuda", "dtype": "of the products: float32 or bfloat16"}
RATE, EPS = 0.1, 1.1920929e-07
LEGEND = """first s: the first step, with compiling and all else that happens once; warm-up s: what
later steps do not take of it; step ms: their median, forward, backward and SGD; loss: the last."""


def numbers(c, B: int):  # weights of the layers, batch, what is to come out
    rng, D = np.random.default_rng(0), c.width
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)] * c.layers
    weights = [draw(*shape) * shape[1] ** -0.5 for shape in shapes]
    return weights, draw(B, c.tokens, D), draw(B, c.tokens, D)


def jax_step(c, B: int, compiled: bool):
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", c.device)
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)
    library = "cudnn" if (c.device, c.dtype) == ("cuda", "bfloat16") else None  # as torch's own

    def loss(weights, x, y):
        weights, x = [w.astype(c.dtype) for w in weights], x.astype(c.dtype)
        for qkv, out, up, down in zip(*(weights[i::4] for i in range(4))):
            heads = (norm(x) @ qkv.T).reshape(B, c.tokens, 3, c.heads, -1)
            q, k, v = (heads[:, :, i] for i in range(3))
            o = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=library)
            x = x + o.reshape(x.shape) @ out.T
            x = x + jnp.square(jax.nn.relu(norm(x) @ up.T)) @ down.T
        return jnp.mean(jnp.square(x - y))

    def sgd(weights, x, y):
        value, grads = jax.value_and_grad(loss)(weights, x, y)
        return [w - RATE * g for w, g in zip(weights, grads)], value

    weights, x, y = jax.device_put(numbers(c, B))
    update = jax.jit(sgd, donate_argnums=0)

    def step() -> float:
        nonlocal weights
        weights, value = jax.block_until_ready(update(weights, x, y))
        return float(value)

    return step


def torch_step(c, B: int, compiled: bool):
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compiling is timed
    import torch
    from torch.nn import functional as F

    weights, *xy = numbers(c, B)
    x, y = (torch.tensor(a, device=c.device) for a in xy)
    weights = [torch.tensor(w, device=c.device, requires_grad=True) for w in weights]
    dtype = getattr(torch, c.dtype)
    norm = lambda x: x * torch.rsqrt(torch.mean(x * x, -1, keepdim=True) + EPS)

    def loss(weights, x, y):
        weights, x = [w.to(dtype) for w in weights], x.to(dtype)
        for qkv, out, up, down in zip(*(weights[i::4] for i in range(4))):
            heads = (norm(x) @ qkv.T).reshape(B, c.tokens, 3, c.heads, -1)
            q, k, v = (heads[:, :, i].transpose(1, 2) for i in range(3))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            x = x + o.reshape(x.shape) @ out.T
            x = x + torch.square(torch.relu(norm(x) @ up.T)) @ down.T
        return torch.mean(torch.square(x - y))

    f = torch.compile(loss) if compiled else loss

    def step() -> float:
        value = f(weights, x, y)
        with torch.no_grad():
            for w, grad in zip(weights, torch.autograd.grad(value, weights)):
                w -= RATE * grad
        return float(value)

    return step


def side(name: str, c, B: int):  # one measurement, as a line of JSON
    step, times = (jax_step if name == "jax" else torch_step)(c, B, "compile" in name), []
    for _ in range(c.steps + 1):
        began, loss = time.perf_counter(), step()
        times.append(time.perf_counter() - began)
    steady = statistics.median(times[1:])
    row = {"batch": B, "side": name, "first s": times[0], "warm-up s": times[0] - steady}
    row |= {"step ms": 1000 * steady, "tokens/s": B * c.tokens / steady, "loss": loss}
    print(json.dumps(row), flush=True)


def drawing(rows: list[dict]) -> str:  # bars of tokens/s, as SVG
    most, groups = max(row["tokens/s"] for row in rows), sorted({row["batch"] for row in rows})
    parts = ['<text x="20" y="20">tokens/s by batch size: forward, backward, SGD</text>']
    for i, (name, colour) in enumerate(SIDES.items()):
        parts.append(f'<text x="{20 + 150 * i}" y="40" fill="{colour}">{name}</text>')
        for row in (row for row in rows if row["side"] == name):
            x, tall = 30 + 180 * groups.index(row["batch"]) + 50 * i, 200 * row["tokens/s"] / most
            box = f'x="{x}" y="{270 - tall:.1f}" width="44" height="{tall:.1f}"'
            parts.append(f'<rect {box} fill="{colour}"/>')
            parts.append(f'<text x="{x}" y="{265 - tall:.1f}">{row["tokens/s"]:,.0f}</text>')
    parts += [f'<text x="{80 + 180 * i}" y="290">{B}</text>' for i, B in enumerate(groups)]
    size = f'width="{max(480, 30 + 180 * len(groups))}" height="300" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *parts, "</svg>"])


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=HELP.get(name))
    c, rows, failed = parser.parse_args(argv), [], False
    if c.side:
        return side(c.side, c, int(c.batches))
    test = subprocess.run(["env", c.torch_python, "-c", "import torch"], capture_output=True)
    if test.returncode:
        sys.exit(f"no PyTorch in {c.torch_python}: pip install torch, or --torch_python=PATH")
    for B, name in product(c.batches.split(","), SIDES):
        command = [c.torch_python if "torch" in name else sys.executable, __file__, *argv]
        command += [f"--side={name}", f"--batches={B}"]
        env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # as torch's: compiling is timed
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:
            why = [f"status {done.returncode}", *done.stderr.splitlines()][-1]
            print(f"{name} failed: {why:.200}")
            failed = True
    lines = [[*rows[0]], *([*row.values()] for row in rows)] if rows else sys.exit(2)
    for line in lines:
        cells = (v if isinstance(v, str) else f"{v:,.5g}" for v in line)
        print("".join(cell.rjust(15) for cell in cells))
    print(LEGEND)
    if c.csv:
        with open(c.csv, "w", newline="") as file:
            csv.writer(file).writerows(lines)
    if c.svg:
        Path(c.svg).write_text(drawing(rows))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
