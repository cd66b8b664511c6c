"""Checks and times what a GPU makes of this code: python tests/gpu_check.py [--cpu] [--seconds=570]

For one H100 or H200, ten minutes at most. NOT RUN ON A GPU YET: only at tiny sizes, with --cpu.
A process for each check; status 0 if the first two pass, on which training relies.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import bench
import model
import parity
import train_gpt

RECORD = 569_000  # tokens/s per GPU in its log, on 8 H100
say = lambda what, how, result: print(f"{what:40} {how:8} {result}", flush=True)
rms = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))  # relative; b is float32
cost = lambda e, ms, than: f"{e[0]:.1e}, {max(e[1:]):.1e}, {ms:.2f} ms, {than / ms:.1f} x as fast"


def losses(kind: str, bars: dict, steps: int, tiny: bool) -> int:  # against the record's own
    float32, steps = kind == "float32", 1 if tiny else steps
    jax.config.update("jax_default_matmul_precision", "highest" if float32 else None)
    data = Path(__file__).with_name("data") / "A"  # from a CPU, in float32
    worst = parity.run(data, steps=steps, report=len, float32=float32)
    passed = all(worst[kind] <= bar for kind, bar in bars.items())  # not with NaN
    errors = ", ".join(f"{kind} {worst[kind]:.1e} of {bar:.0e}" for kind, bar in bars.items())
    say(f"{kind}: {steps} steps of the record", "pass" if passed else "FAIL", errors)
    return 0 if passed else 3


def milliseconds(f, *args) -> float:  # of a call among many
    for _ in range(2):  # the first time is for warming up
        began = time.perf_counter()
        jax.block_until_ready([f(*args) for _ in range(5)])
    return 200 * (time.perf_counter() - began)


@partial(jax.jit, static_argnums=0)
def both(f, q, k, v, do):  # output and gradients
    o, pull = jax.vjp(f, q, k, v)
    return o, *pull(do)


def attention(tiny: bool):  # of documents: both against `attend` in float32; q as the model has it
    K, dtype = 32 if tiny else 128, jnp.bfloat16
    chosen, why = model.trusted(model.cudnn, K, dtype)
    say("attention at start-up", "", chosen.__name__ + why)
    sizes = (2048, 128, 1), (8192, 384, 2), (16384, 896, 1), (49152, 768, 2), (49152, 1664, 1)
    for T, W, P in [(128, 32, 1), (128, 32, 2)] if tiny else sizes:
        rng, shape = (
            np.random.default_rng(T),
            (2, 2, T, K) if tiny else (max(1, 16384 // T), 6, T, K),
        )
        args = [jnp.asarray(s * rng.normal(size=shape), dtype) for s in (0.1, 1, 1, 1)]
        doc = jnp.asarray(np.cumsum(rng.random((shape[0], T)) < 1 / 400, 1))
        plain = partial(model.attend, doc=doc, window=W, P=P)
        with jax.default_matmul_precision("highest"):
            want = both(plain, *(x.astype(jnp.float32) for x in args))
        off = [rms(*pair) for pair in zip(both(plain, *args), want)]
        slow = milliseconds(both, plain, *args)
        name = f"{T} tokens, window {W}, {P} heads at once"
        say(name, "", f"attend: {cost(off, slow, slow)}")
        try:
            f = partial(model.cudnn, doc=doc, window=W, P=P)
            errors = [rms(*pair) for pair in zip(both(f, *args), want)]
            close = all(a <= 2 * b + 2e-3 for a, b in zip(errors, off))
            fast = milliseconds(both, f, *args)
            say(name, "agrees" if close else "DIFFERS", f"cudnn: {cost(errors, fast, slow)}")
        except Exception as error:  # whatever the library, its version or the GPU lack
            say(name, "", "cudnn skipped: no GPU" if tiny else f"cudnn: {str(error)[:200]!r}")


def fp8(tiny: bool):  # the head's product forwards
    M, V, D = (64, 128, 64) if tiny else (16384, 50304, 768)
    x, w = (jax.random.normal(jax.random.key(n), (n, D), jnp.bfloat16) for n in (M, V))
    product = lambda x, w: jnp.einsum("td,vd->tv", x, w, preferred_element_type=jnp.bfloat16)
    ways = {"bfloat16": (product, x, w), "e4m3": (product, model.e4m3(x), model.e4m3(w))}
    ways["e4m3 with casts"] = lambda x, w: product(model.e4m3(x), model.e4m3(w)), x, w
    want = np.asarray(x[:999], np.float32) @ np.asarray(w, np.float32).T
    for name, (f, *args) in ways.items():
        ms, e = milliseconds(f := jax.jit(f), *args), rms(f(*args)[:999], want)
        say(f"head in {name}", "", f"{e:.1e}, {ms:.2f} ms, {2e-9 * M * V * D / ms:,.0f} TFLOP/s")


def stage(i: int, rows: int, tiny: bool):  # its speed and memory on one device
    small = {"preset": "smoke", "width": 16, "heads": 2, "layers": "pvs,k,b", "bigram_rows": 64}
    c = train_gpt.Config(**small if tiny else {}, mesh="fsdp:1", device_rows=rows)
    train_gpt.start(c)
    row = bench.measure(c, i)
    result = f"{row['tokens/s']:,.0f} tokens/s, {row['tokens/s'] / RECORD:.1%} of the record's"
    result += f", {row['step ms']:.1f} ms, MFU {row['MFU']}, {row['peak GiB']:.1f} GiB"
    say(f"{c.preset} stage {i}, {rows} rows at once", "", result)


CHECKS = {"float32": partial(losses, "float32", parity.BARS, 6)}
CHECKS |= {"bfloat16": partial(losses, "bfloat16", {"loss": 1e-3, "gradient": 0.1}, 2)}
CHECKS |= {"stage 0": partial(stage, 0, 1), "attention": attention, "fp8": fp8}
LARGE = {f"stage {i}": partial(stage, i, 1) for i in (3, 1, 2)} | {"4 rows": partial(stage, 0, 4)}


def check(name: str, argv: list[str], end: float) -> bool:
    command = [sys.executable, "-W", "ignore", __file__, f"--check={name}", *argv]
    limit = ["timeout", "-k", "5", str(max(1, end - time.monotonic()))]
    done = subprocess.run(limit + command, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 124: out of time
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        say(name, "", f"failed: {[f'status {done.returncode}', *errors][-1]}")
    return done.returncode == 0


def main(argv: list[str]) -> int:
    keys = dict(word.partition("=")[::2] for word in argv)
    tiny, end = "--cpu" in keys, time.monotonic() + float(keys.get("--seconds", 570))
    if not tiny and train_gpt.accelerator() != "GPU":
        sys.exit("gpu_check: no GPU here; --cpu goes through it at tiny sizes")
    jax.config.update("jax_platforms", "cpu" if tiny else "cuda")  # no silent fall to the CPU
    if "--check" in keys:
        return (CHECKS | LARGE)[keys["--check"]](tiny=tiny) or 0
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the first two share the GPU
    run, names = partial(check, argv=argv, end=end), [*CHECKS, *({} if tiny else LARGE)]
    passed = all([*ThreadPoolExecutor(2).map(run, names[:2])])
    for name in names[2:]:
        run(name)
    return print("gpu_check:", "passed" if passed else "FAILED") or int(not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
