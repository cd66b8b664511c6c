"""Checks and times what a GPU makes of this code: python tests/gpu_check.py [--data=SHARDS]
[--out=DIR] [--only=CHECK,...] [--seconds=570] [--cpu]

For one H100 or H200, ten minutes at most. NOT RUN ON A GPU YET: only at tiny sizes, with --cpu.
A process for each check; status 1 if one fails, but not where only the time is out. After parity,
attention and the head's product speedrun is trained for 80 steps, as it is, with fp8, and by plain
attention for as long as the time lasts, on --data or FineWeb; DIR gets the runs, without their
checkpoints, and a picture, curves.svg.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import bench
import curves
import model
import parity
import sharding
import tool
import train_gpt

RECORD = 569_000  # tokens/s per GPU in its log, on 8 H100
TINY = {"preset": "smoke", "width": 16, "heads": 2, "layers": "pvs,k,b", "bigram_rows": 64}
SHORT = {"steps": 80, "val_tokens": 2**20, "val_row_tokens": 2**16}  # 21M tokens
TINY_SHORT = {"steps": 24, "val_tokens": 8192, "val_row_tokens": 1024}
say = lambda what, how, result: print(f"{what:40} {how:8} {result}", flush=True)
rms = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))  # relative; b is float32
cost = lambda e, ms, than: f"{e[0]:.1e}, {max(e[1:]):.1e}, {ms:.2f} ms, {than / ms:.1f} x as fast"


def losses(kind: str, bars: dict, steps: int, keys: dict) -> int:  # against the record's own
    float32, steps = kind == "float32", 1 if "cpu" in keys else steps
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


def attention(keys: dict):  # of documents: both against `attend` in float32; q as the model has it
    tiny = "cpu" in keys
    K, dtype = 32 if tiny else 128, jnp.bfloat16
    right, why = model.trusted(model.cudnn, K, dtype)
    say("attention at start-up", "", ("cudnn" if right else "attend") + why)
    freqs, f32 = model.yarn(K, [384, 896, 1408, 1664])[0], jnp.float32
    angles = np.float32(range(524288))[:, None] * freqs  # of a row of validation, in pairs
    off = [
        np.abs(f(jnp.asarray(angles)) - g(angles)).max()
        for f, g in ((jnp.cos, np.cos), (jnp.sin, np.sin))
    ]
    passed = max(off) < 1e-5
    say("cos, sin of rotary's largest angles", "agree" if passed else "DIFFER", f"{max(off):.1e}")
    sizes = (
        (256, 2560, 1),
        (2048, 128, 1),
        (8192, 384, 2),
        (16384, 896, 1),
        (49152, 768, 2),
        (49152, 1664, 1),
    )
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
        passed = passed and all(e < 0.02 for e in off)  # 0.003 by rounding; not with NaN
        slow = milliseconds(both, plain, *args)
        name = f"{T} tokens, window {W}, {P} heads at once"
        say(name, "", f"attend: {cost(off, slow, slow)}")
        try:
            f = partial(model.cudnn, doc=doc, window=W, P=P)
            errors = [rms(*pair) for pair in zip(both(f, *args), want)]
            close = all(a <= 2 * b + 2e-3 for a, b in zip(errors, off))
            passed, fast = passed and close, milliseconds(both, f, *args)
            say(name, "agrees" if close else "DIFFERS", f"cudnn: {cost(errors, fast, slow)}")
        except Exception as error:  # a run that trusts it would end with it
            passed = passed and not right
            say(name, "", "cudnn skipped: no GPU" if tiny else f"cudnn: {str(error)[:200]!r}")
    T, W, P = (1024, 90, 2) if tiny else (262144, 2560, 2)  # a row of validation
    q, k, v = (
        jax.random.normal(key, (1, 2, T, K), dtype)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    doc, runs = jnp.arange(T)[None] // (4 * W), (model.attend, model.cudnn)  # windows bind
    name = f"{T} tokens, window {W}, forward alone"
    try:
        want, got = (jax.jit(f, static_argnums=(4, 5))(q / 9, k, v, doc, W, P) for f in runs)
        error = rms(got, want.astype(f32))
        passed = passed and error < 0.02
        say(name, "agrees" if error < 0.02 else "DIFFERS", f"cudnn: {error:.1e}")
    except Exception as error:  # a run would end with it
        passed = passed and not right
        say(name, "", "cudnn skipped: no GPU" if tiny else f"cudnn: {str(error)[:200]!r}")
    return 0 if passed else 3


def head(keys: dict):  # its product forwards
    M, V, D = (64, 128, 64) if "cpu" in keys else (16384, 50304, 768)
    x, w = (jax.random.normal(jax.random.key(n), (n, D), jnp.bfloat16) for n in (M, V))
    product = lambda x, w: jnp.einsum("td,vd->tv", x, w, preferred_element_type=jnp.bfloat16)
    ways = {"bfloat16": (product, x, w), "e4m3": (product, model.e4m3(x), model.e4m3(w))}
    ways["e4m3 with casts"] = lambda x, w: product(model.e4m3(x), model.e4m3(w)), x, w
    want = np.asarray(x[:999], np.float32) @ np.asarray(w, np.float32).T
    for name, (f, *args) in ways.items():
        ms, e = milliseconds(f := jax.jit(f), *args), rms(f(*args)[:999], want)
        say(f"head in {name}", "", f"{e:.1e}, {ms:.2f} ms, {2e-9 * M * V * D / ms:,.0f} TFLOP/s")


def speed(tokens_per_second: float, mfu: str) -> str:
    share = f"{tokens_per_second / RECORD:.1%} of the record's"
    return f"{tokens_per_second:,.0f} tokens/s, {share}, MFU {mfu}"


def stage(i: int, rows: int, keys: dict):  # the same step again and again
    short = TINY | TINY_SHORT if "cpu" in keys else SHORT  # so that the cache has it
    c = train_gpt.Config(**short, mesh="fsdp:1", device_rows=rows)
    train_gpt.start(c)
    row = bench.measure(c, i)
    result = f"{speed(row['tokens/s'], row['MFU'])}, {row['step ms']:.1f} ms"
    result += f", {row['peak GiB']:.1f} GiB"
    say(f"stage {i}, {rows} rows at once", "", result)


def read(kind: str) -> tuple[list, dict]:  # milliseconds at each step, curves of such a run
    csv = "".join(path.read_text() for path in Path("runs").glob(f"{kind}-*/metrics.csv"))
    lines = [line.split(",") for line in csv.splitlines()]
    return [int(ms) for _, ms, name, _ in lines if name == "train_loss"], curves.read(csv)


def training(kind: str, keys: dict):  # to its end, or to the time's; then speed and losses
    here = Path("data/fineweb10B")  # as a run of speedrun has left it
    there = all(any(here.glob(f"*_{part}_*.bin")) for part in ("train", "val"))
    data = keys.get("data", str(here) if there else here.name)
    data = str(Path(data).absolute()) if Path(data).exists() else data
    more = TINY | TINY_SHORT if "cpu" in keys else SHORT | {"data": data}
    c = train_gpt.Config(**more, fp8=kind == "fp8", mesh="fsdp:1", run=kind, resume=False)
    os.chdir(keys["out"])
    if kind == "plain":
        model.cudnn = model.attend
    ocp.CheckpointManager.save = lambda *_, **__: True  # 8 GB that nobody reads
    end = float(keys["end"]) - 30  # in which it validates and compiles again
    stop = lambda step: step > 2 and time.monotonic() > end
    with redirect_stdout(sys.stderr), suppress(SystemExit):
        train_gpt.train(c, stop)
    (run,) = Path("runs").glob(f"{kind}-*")
    said = next(x for x in (run / "log.txt").open() if x.startswith("attention by "))
    say(f"training, {kind}", "", said.partition(";")[0])
    (at, seen), mesh = read(kind), sharding.make_mesh(c.mesh)
    p = train_gpt.program(c, mesh)
    for i, (first, end, s) in enumerate(c.schedule()):
        first, last = first // 2 * 2 + 2, min(end, len(at)) // 2 * 2  # Adam: every second step
        if last - first > 3:
            rate = 1000 * s.tokens * (last - first) / max(1, at[last - 1] - at[first - 1])
            say(f"  stage {i}", "", speed(rate, bench.mfu(rate, c, p, i, mesh)))
    mean = lambda curve: np.mean([value for _, value in curve["train_loss"][: len(at)][-10:]])
    val = lambda curve: dict(curve["val_loss"]).get(c.steps, np.nan)
    result = f"train {mean(seen):.4f} (of the last 10), validation {val(seen):.4f}"
    say(f"  losses after {len(at)} steps", "", result)
    if kind != "speedrun" and (base := read("speedrun")[1]):
        result = f"train {mean(seen) - mean(base):+.4f}, validation {val(seen) - val(base):+.4f}"
        apart = [abs(a - b) for (_, a), (_, b) in zip(seen["train_loss"], base["train_loss"])]
        say("  less the first run's", "", f"{result}; steps part by {max(apart):.4f} at most")


def pytorch(keys: dict):  # 11 blocks of speedrun's size in both
    size = "--tokens=2048 --width=768 --heads=6 --layers=11 --batches=8"
    size += " --device=cuda --dtype=bfloat16"
    size = "--tokens=8 --width=8 --heads=2 --layers=1 --steps=2" if "cpu" in keys else size
    script = str(Path(__file__).with_name("bench_torch.py"))
    done = subprocess.run([sys.executable, script, *size.split()], capture_output=True, text=True)
    say("blocks in JAX and PyTorch", "", size)
    print(done.stdout + done.stderr, end="", flush=True)
    return 3 if done.returncode and importlib.util.find_spec("torch") else 0


CHECKS = {"float32": partial(losses, "float32", parity.BARS, 6)}
CHECKS |= {"bfloat16": partial(losses, "bfloat16", {"loss": 1e-3, "gradient": 0.1}, 2)}
CHECKS |= {"attention": attention, "head": head}
CHECKS |= {"stage-0": partial(stage, 0, 1), "stage-2": partial(stage, 2, 1)}  # runs need them
CHECKS |= {"speedrun": partial(training, "speedrun"), "pytorch": pytorch}
CHECKS |= {"fp8": partial(training, "fp8"), "4-rows": partial(stage, 0, 4)}
CHECKS |= {"plain": partial(training, "plain")}


def check(name: str, argv: list[str], end: float) -> bool | None:  # None: out of time
    command = [sys.executable, "-W", "ignore", __file__, *argv, f"--check={name}", f"--end={end}"]
    limit = ["timeout", "--foreground", "-k", "5", str(max(1, end - time.monotonic()))]
    done = subprocess.run(limit + command, stderr=subprocess.PIPE, text=True)
    killed = done.returncode in (-9, 137)  # for not ending 5 s after it was told, or for memory
    late = done.returncode == 124 or killed and time.monotonic() >= end
    if done.returncode not in (0, 3):  # 2: what the user can mend is its last line
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "Error" in line or done.returncode == 2]
        why = "out of time" if late else [f"status {done.returncode}", *errors][-1]
        say(name, "", f"failed: {why:.300}")
    return None if late else done.returncode == 0


def main(argv: list[str]) -> int:
    keys = tool.keys_of(argv)
    end = time.monotonic() + train_gpt.typed("seconds", keys.get("seconds", 570), "570")
    if "cpu" not in keys and train_gpt.accelerator() != "GPU":
        raise sharding.InputError("no GPU here; --cpu goes through it at tiny sizes")
    jax.config.update("jax_platforms", "cpu" if "cpu" in keys else "cuda,cpu")  # not without cuda
    if "check" in keys:
        return CHECKS[keys["check"]](keys=keys) or 0
    names = keys.get("only", ",".join(CHECKS)).split(",")
    first = [n for n in names if train_gpt.choose("--only", n, CHECKS) in ("float32", "bfloat16")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(keys.get("out", folder)).absolute()
        if (out / "runs").exists():
            raise sharding.InputError(f"--out={out} has runs already")
        out.mkdir(parents=True, exist_ok=True)
        run = partial(check, argv=[*argv, f"--out={out}"], end=end)
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # these two share the GPU
        done = dict(zip(first, ThreadPoolExecutor(2).map(run, first)))
        del os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]
        done |= {name: run(name) for name in names if name not in first}
        for empty in out.glob("runs/*/checkpoints"):
            shutil.rmtree(empty)
        found = {p.parent.name: curves.read(p.read_text()) for p in out.glob("runs/*/metrics.csv")}
        if found := {name: seen for name, seen in found.items() if seen}:
            picture = curves.picture([*found.values()], None, [*found])
            (out / "curves.svg").write_text(picture)
    failed = [name for name, passed in done.items() if passed is False]
    right = [name for name in ("float32", "bfloat16", "attention") if done.get(name)]
    what = f"passed: {', '.join(right)}" if right else "measured, but nothing checked"
    print("gpu_check:", f"FAILED: {', '.join(failed)}" if failed else what)
    return int(bool(failed))


if __name__ == "__main__":
    tool.run(main)
