"""NanoGPT speedrun in JAX: trains record #77's recipe to 3.28 validation loss on FineWeb.

python train_gpt.py [COMMAND] [--key=value ...]      (./launch does the same and sets up Python)

  train     the main job; preset speedrun where there is a GPU or TPU, else smoke on the CPU
  sample    text from a checkpoint: --run=NAME [--prompt=TEXT --tokens=N --temperature=T --top_k=K]

Keys are the fields of Config, for example --preset=smoke --steps=100 --mesh=data:2,fsdp:4.
"""

import ast
import dataclasses
import difflib
import functools
import glob
import inspect
import json
import math
import os
import platform
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import data_fineweb
import model
import muon
import sharding

HERE = Path(__file__).parent
SOURCES = ("launch", "train_gpt.py", "model.py", "muon.py", "data_fineweb.py", "sharding.py")


class ConfigError(ValueError):
    """Something that the user can mend, in one line."""


class Stage(NamedTuple):
    """A row of the schedule."""

    end: float  # as a part of the run's steps
    tokens: int  # per step
    max_doc: int  # longer documents are cut
    short: int  # attention windows, in tokens
    long: int
    lr: float  # times the learning rates
    mtp: tuple  # weights of the next tokens' losses, from the start of the stage to its end
    mtp_end: tuple


STAGES = {
    "speedrun": (  # the last row is the extension: the learning rate is at its floor there
        Stage(483 / 1490, 131072, 896, 128, 384, 1.0, (1, 0.5, 0.25), (1, 0.5, 0)),
        Stage(967 / 1490, 262144, 2048, 384, 896, 1.52, (1, 0.5), (1, 0)),
        Stage(1450 / 1490, 393216, 2048, 640, 1408, 1.73, (1,), (1,)),
        Stage(1, 393216, 2048, 768, 1664, 1.0, (1,), (1,)),
    ),
    "smoke": (
        Stage(0.33, 2048, 896, 16, 48, 1.0, (1, 0.5, 0.25), (1, 0.5, 0)),
        Stage(0.66, 4096, 1024, 32, 64, 1.52, (1, 0.5), (1, 0)),
        Stage(1, 4096, 1024, 32, 96, 1.73, (1,), (1,)),
    ),
}
PRESETS = {  # what differs from the defaults of Config
    "speedrun": "",
    "smoke": "data=stdlib device=cpu float32=true steps=300 val_every=150 device_rows=8 stages=smoke"
    " layers=pv,ls,k,b,lv width=128 heads=4 vocab=264 bos=256 bigram_rows=4096"
    " val_tokens=262144 val_row_tokens=8192 val_long=192",
}


@dataclasses.dataclass(frozen=True, init=False)
class Config:
    """Every key. Config(preset="smoke", steps=50): the preset's values, then those given."""

    preset: str = "speedrun"
    data: str = "fineweb10B"  # or finewebedu10B, stdlib, a path to .bin shards or .txt files
    mesh: str = ""  # e.g. data:2,fsdp:2,tensor:2; empty: all devices on fsdp
    seed: int = 0
    steps: int = 1490  # all that the recipe counts in steps scales with them
    val_every: int = 250
    save_every: int = 250
    run: str = ""  # name of the run to start or go on with; empty: a fresh one
    resume: bool = True  # false: a run of that name is left as it is, NAME-1 starts over
    device: str = "auto"  # cpu, gpu, tpu
    cpu_devices: int = 1  # virtual devices on the CPU
    float32: bool = False  # all arithmetic in float32
    target: float = 3.28
    device_rows: int = 1  # rows per device at once: fewer need less memory, the result is the same
    rows: int = 8  # a step's tokens are cut into so many rows
    stages: str = "speedrun"  # the schedule, one of STAGES
    layers: str = "p,v,pv,ls,o,p,k,b,v,pv,lv"  # see model.param_table
    width: int = 768
    heads: int = 6
    vocab: int = 50304
    bos: int = 50256  # the token that starts a document
    bigram_rows: int = 5 * 50304
    muon_lr: float = 0.023
    adam_lr: float = 0.008
    lr_fall: float = 0.6  # part of the scheduled steps, at their end, in which the rates fall
    lr_floor: float = 0.15  # to this part of the base rates
    momentum_rise: float = 300 / 1490  # parts of the steps, at their start and end, in which Muon's
    momentum_fall: float = 50 / 1490  # momentum rises from 0.85 to 0.95, and falls again
    val_tokens: int = 10_485_760
    val_row_tokens: int = 262_144
    val_long: int = 20 * 128  # long window of the last validation (record 33)

    def __init__(self, **keys):
        """Values as text or typed. Raises ConfigError."""
        values = {field.name: field.default for field in dataclasses.fields(Config)}
        preset = choose("preset", keys.get("preset", "speedrun"), PRESETS)
        for name, value in [*(word.split("=") for word in preset.split()), *keys.items()]:
            values[name] = typed(name, value, choose("key", name, values))
        self.__dict__.update(values)
        choose("stages", self.stages, STAGES)

    def schedule(self) -> list[tuple[int, int, Stage]]:
        """(first step, end, stage) of each stage."""
        stages = STAGES[self.stages]
        ends = [round(stage.end * self.steps) for stage in stages]
        return list(zip([0, *ends], ends, stages))

    def stage(self, step: int) -> int:
        ends = [end for _, end, _ in self.schedule()]
        return sum(step >= end for end in ends[:-1])


# Keys that cannot change the result: a run may go on with other values of them.
FREE = ("mesh", "device_rows", "val_every", "save_every", "run", "resume", "device", "cpu_devices")


def choose(what: str, name: str, table: dict):
    """table[name], or a ConfigError that names the nearest there is."""
    if name not in table:
        close = difflib.get_close_matches(name, table, 1, 0)
        raise ConfigError(f"unknown {what} '{name}': did you mean '{close[0]}'?")
    return table[name]


def typed(name: str, value, default):
    """`value`, perhaps text, in the type of the default. Raises ConfigError."""
    kind = type(default)
    if isinstance(value, str) and kind is not str:
        try:
            value = ast.literal_eval(value.title() if kind is bool else value)
        except (ValueError, SyntaxError):
            pass
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise ConfigError(f"--{name}={value}: expected {kind.__name__}, as in --{name}={default}")
    return value


class Program(NamedTuple):
    """The functions of a config on a mesh. The state is {"params", "muon", "adam", "step"}."""

    init: callable  # key -> state
    gradients: callable  # params, rows (rows, T + 1), step, stage -> loss per token, gradients
    update: callable  # state, gradients -> state, norm of the gradients
    evaluate: callable  # params, rows, view -> mean loss
    generate: callable  # params, tokens (1, T), start, stop, key, temperature, top_k -> tokens
    like: dict  # the state as shapes with their places on the devices


def program(c: Config, mesh) -> Program:
    """Compiles nothing yet. Raises MeshError where the mesh does not fit the model."""
    table, schedule = model.param_table(c), c.schedule()
    for name, row in table.items():
        sharding.check(mesh, name, row.shape, row.axes)
    sharding.check(mesh, "rows", [c.rows], ["rows"])
    longs, dtype = [s.long for *_, s in schedule], jnp.float32 if c.float32 else jnp.bfloat16
    yarns = [model.yarn(c.width // c.heads, longs[: i + 1]) for i in range(len(longs))]
    views = [model.View(s.short, s.long, *yarn) for (*_, s), yarn in zip(schedule, yarns)]
    views.append(views[-1]._replace(long=c.val_long))
    specs = {name: sharding.spec(row.axes) for name, row in table.items()}
    whole, by_rows = sharding.spec([]), sharding.spec(["rows"])
    scheduled, untie = schedule[-2][1], schedule[1][1] | 1

    def rate(base, step):
        lr = jnp.select([step < end for _, end, _ in schedule], [s.lr for *_, s in schedule])
        start = int(scheduled * (1 - c.lr_fall))
        t = jnp.clip((step - start) / max(1, scheduled - start), 0, 1)
        return base * (lr * (1 - t) + c.lr_floor * t)

    def momentum(step):
        rise, fall = step / c.momentum_rise, (c.steps - step) / c.momentum_fall
        return 0.85 + 0.1 * jnp.clip(jnp.minimum(rise, fall) / c.steps, 0, 1)

    muon_rows = {name: row for name, row in table.items() if not row.betas}
    adam_rows = {name: row for name, row in table.items() if row.betas}
    split = functools.partial(sharding.spread, mesh)
    rules = {
        "muon": muon.normuon(muon_rows, functools.partial(rate, c.muon_lr), momentum, dtype, split),
        "adam": muon.adam(adam_rows, functools.partial(rate, c.adam_lr)),
    }

    def init(key):
        params = model.init(table, key)
        states = {name: rule.init(params) for name, rule in rules.items()}
        return {"params": params, "step": jnp.zeros((), jnp.int32), **states}

    def gradients(params, rows, step, stage):
        start, end, s = schedule[stage]
        t = (step - start) / max(1, end - start)
        weights = (1 - t) * jnp.asarray(s.mtp, jnp.float32) + t * jnp.asarray(s.mtp_end)

        def local(params, rows, weights):
            w, pull = jax.vjp(lambda params: model.use(table, params, dtype), params)

            def some(sums, rows):
                new = jax.value_and_grad(model.loss)(w, rows, c, views[stage], weights)
                return jax.tree.map(jnp.add, sums, new), None

            zeros = jnp.zeros(()), {name: jnp.zeros(x.shape) for name, x in w.items()}
            rows = rows.reshape(-1, min(c.device_rows, len(rows)), rows.shape[1])
            (loss, grads), _ = jax.lax.scan(some, zeros, rows)
            grads = {name: (g / c.rows).astype(w[name].dtype) for name, g in grads.items()}
            return sharding.total(loss, "rows"), pull(grads)[0]

        f = sharding.spmd(
            local, mesh=mesh, in_specs=(specs, by_rows, whole), out_specs=(whole, specs)
        )
        loss, grads = f(params, rows, weights)
        return loss / (rows.shape[0] * (rows.shape[1] - 1)), grads

    def update(state, grads):
        norm, params, step = optax.global_norm(grads), state["params"], state["step"]
        shared = grads["head"] + grads["embed"]  # tied is to get equal gradients (51, 53)
        grads |= {n: jnp.where(step <= untie, shared, grads[n]) for n in ("head", "embed")}
        new = {"step": step + 1}
        for name, rule in rules.items():
            updates, new[name] = rule.update(grads, state[name], params)
            params = params | {n: params[n] + u for n, u in updates.items()}
        return new | {"params": params}, norm

    def evaluate(params, rows, view):
        def local(params, rows):
            w = model.use(table, params, dtype)
            sums = jax.lax.map(
                lambda row: model.loss(w, row[None], c, views[view], jnp.ones(1)), rows
            )
            return sharding.total(sums.sum(), "rows")

        f = sharding.spmd(local, mesh=mesh, in_specs=(specs, by_rows), out_specs=whole)
        return f(params, rows) / (rows.shape[0] * (rows.shape[1] - 1))

    def generate(params, tokens, start, stop, key, temperature, top_k):
        def local(params, *args):
            w = model.use(table, params, dtype)
            return model.generate(w, c, views[-1], top_k, *args)

        f = sharding.spmd(local, mesh=mesh, in_specs=(specs, *[whole] * 5), out_specs=whole)
        return f(params, tokens, start, stop, key, temperature)

    def place(path, leaf):  # by the name in the table; a dimension of 1 is not split
        axes = table[path[-1].key].axes if getattr(path[-1], "key", "step") in table else ()
        at = sharding.placed(mesh, [a if n > 1 else None for a, n in zip(axes, leaf.shape)])
        return leaf.update(sharding=at)

    like = jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, jax.random.key(0)))
    at = jax.tree.map(lambda leaf: leaf.sharding, like)
    return Program(
        jax.jit(init, out_shardings=at),
        jax.jit(gradients, static_argnums=3, out_shardings=(None, at["params"])),
        jax.jit(update, donate_argnums=(0, 1), out_shardings=(at, None)),
        jax.jit(evaluate, static_argnums=2),
        jax.jit(generate, static_argnums=6),
        like,
    )


class Journal:
    """The console, log.txt, metrics.csv and TensorBoard of a run, by process 0."""

    def __init__(self, run: Path, c: Config, step: int):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        rule, n, kind = "=" * 100, jax.device_count(), jax.devices()[0].device_kind
        sources = "".join((HERE / name).read_text() for name in SOURCES if (HERE / name).exists())
        versions = f"Python {platform.python_version()}, JAX {jax.__version__}, {n} x {kind}"
        config = json.dumps(dataclasses.asdict(c))
        header = f"{sources}{rule}\n{versions}\nconfig {config}\n{rule}\n"
        self.steps, self.log, self.csv = c.steps, run / "log.txt", run / "metrics.csv"
        for path, start in (self.log, header), (self.csv, "step,train_time_ms,name,value\n"):
            path.write_text(before(path, step) if step else start)
        self.board = EventFileWriter(str(run / "tensorboard"), flush_secs=5)
        if step:  # TensorBoard drops what the interrupted run had written from here on
            self.event(step, session_log=SessionLog(status=SessionLog.START))
        self.text(step, "config", config)

    def event(self, step: int, **what):
        from tensorboard.compat.proto.event_pb2 import Event

        self.board.add_event(Event(wall_time=time.time(), step=step, **what))

    def text(self, step: int, tag: str, text: str):
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.event(step, summary=text_pb(tag, text))

    def say(self, line: str, show: bool = True):
        with self.log.open("a") as log:
            log.write(line + "\n")
        if show and jax.process_index() == 0:
            print(line, flush=True)

    def scalar(self, step: int, seconds: float, name: str, value: float, show: bool = True):
        from tensorboard.compat.proto.summary_pb2 import Summary

        ms = 1000 * seconds
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        if name.endswith("loss"):
            self.say(f"step:{step}/{self.steps} {name}:{value:.4f} {times}", show)
        with self.csv.open("a") as csv:
            csv.write(f"{step},{ms:.0f},{name},{value}\n")
        at = step if name == "val_loss" else step - 1  # the step whose batch it was
        self.event(at, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))


def before(path: Path, step: int) -> str:
    """A log up to the checkpoint of `step`, which is made before that step's validation."""
    text = path.read_text()
    for line in re.finditer(r"^(?:step:)?(\d+)[/,].*?(val_loss)?.*$", text, re.MULTILINE):
        if int(line[1]) + ("val_loss" in line[0]) > step:
            return text[: line.start()]
    return text


def checkpoints(run: Path):
    """orbax's manager of the run's two newest checkpoints: {"state", "meta"} each."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)


def save(manager, state, **meta):
    """Starts writing in the background; `state` may be donated when this returns."""
    from orbax.checkpoint import args

    if meta["step"] in manager.all_steps():  # it could not be read, or this run would be past it
        manager.delete(meta["step"])
    both = args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta))
    manager.save(meta["step"], args=both)


def restore(manager, like):
    """(state, meta) of the newest checkpoint that can be read, laid out as `like`, or None."""
    from orbax.checkpoint import args

    both = args.Composite(state=args.StandardRestore(like), meta=args.JsonRestore())
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            got = manager.restore(step, args=both)
            return got["state"], got["meta"]
        except Exception as error:  # whatever it is that the library stumbles over
            print(f"warning: checkpoint {step} is damaged, trying the one before: {error!s:.200}")
    if steps:
        raise ConfigError(f"no checkpoint in {manager.directory} can be read: start another --run")
    return None


class Result(NamedTuple):
    val_loss: float
    train_time: float  # seconds
    run_dir: Path


def accelerator() -> str:
    """The accelerator that this machine has, whatever JAX can use of it."""
    vendors = (Path(path).read_text() for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    if glob.glob("/dev/nvidia[0-9]*"):
        return "GPU"
    return "TPU" if "0x1ae0\n" in vendors else ""


def start(c: Config):
    """Devices and processes, once per Python process. Raises ConfigError on a silent fall-back."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(HERE / ".cache" / "jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_default_matmul_precision", "highest" if c.float32 else None)
    try:
        if c.device != "auto":
            jax.config.update("jax_platforms", {"gpu": "cuda"}.get(c.device, c.device))
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)
        sharding.start_processes()
    except RuntimeError:  # JAX is in use already, as in a notebook or a test
        pass
    if jax.default_backend() == "cpu" and c.device != "cpu" and accelerator():
        raise ConfigError(
            f"this machine has a {accelerator()}, but JAX sees only the CPU: install JAX's plugin for"
            " it (./launch does), end other processes that hold it, or say --device=cpu"
        )


def open_run(c: Config) -> tuple[Path, str]:
    """Directory and log of the run so far. Raises ConfigError where it has another config."""
    fresh = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    names = [c.run or fresh, *(f"{c.run}-{i}" for i in range(1, 1000))]
    run = next(p for p in map(Path("runs").joinpath, names) if c.resume or not p.exists())
    run.mkdir(parents=True, exist_ok=True)
    log = run / "log.txt"
    if not log.exists():
        return run, ""
    config = re.search(r"^config (.*)$", log.read_text(), re.MULTILINE)
    was, now = json.loads(config[1]) if config else {}, dataclasses.asdict(c)
    differ = [f"{name} was {was.get(name)}" for name in now if was.get(name) != now[name]]
    if differ := [text for text in differ if text.split()[0] not in FREE]:
        raise ConfigError(f"{run} has another config: {', '.join(differ)}: choose another --run")
    return run, log.read_text()


def listen():
    """A function of the step: were we told to stop? All processes get the same answer."""
    several, asked = jax.process_count() > 1, []

    def hear(number, frame):
        signal.signal(number, signal.SIG_DFL)  # the second one stops at once
        asked.append(number)
        if several:  # JAX's own preemption service listens to SIGTERM and tells the others
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        for number in [signal.SIGINT] + [signal.SIGTERM] * (not several):
            signal.signal(number, hear)
    return multihost_utils.reached_preemption_sync_point if several else lambda step: bool(asked)


def train(c: Config) -> Result:
    """Trains, or goes on with the run of that name, to the last step and validation."""
    start(c)
    run, log = open_run(c)
    final = rf"^(step:{c.steps}/{c.steps} val_loss:(\S+) train_time:(\d+)ms.*)$"
    if done := re.search(final, log, re.MULTILINE):
        print(done[1])
        return Result(float(done[2]), int(done[3]) / 1000, run)
    mesh = sharding.make_mesh(c.mesh)
    p, schedule = program(c, mesh), c.schedule()
    corpus = data_fineweb.open_corpus(c.data, c.vocab, c.bos)
    stages = [schedule[c.stage(step)][2] for step in range(c.steps)]
    plan = data_fineweb.plan(corpus, [(s.tokens // c.rows, s.max_doc, c.rows) for s in stages])
    held_out = data_fineweb.validation(corpus, c.val_tokens, c.val_row_tokens)
    sharding.check(mesh, "validation", [len(held_out)], ["rows"])
    val = sharding.global_rows(mesh, len(held_out), lambda first, n: held_out[first : first + n])

    def batch(step):
        read = functools.partial(data_fineweb.batch, plan, min(step, c.steps - 1))
        return sharding.global_rows(mesh, c.rows, read)

    manager = checkpoints(run)
    state, meta = restore(manager, p.like) or (None, {"step": 0, "train_time": 0.0})
    first, spent = meta["step"], meta["train_time"]
    journal = Journal(run if jax.process_index() == 0 else Path(tempfile.mkdtemp()), c, first)
    n = sharding.ways(mesh, "rows")
    once = min(c.device_rows, c.rows // n)
    for tokens in dict.fromkeys(s.tokens for *_, s in schedule):
        rows = f"{tokens} tokens/step = {c.rows} rows x {tokens // c.rows}"
        journal.say(f"{rows} = {n} devices x {once} row x {c.rows // n // once} accumulation")

    began, like = time.perf_counter(), p.like["params"]
    views = {c.stage(step) for step in range(first, c.steps, c.val_every)} | {len(schedule)}
    jobs = {("val", i): functools.partial(p.evaluate.lower, like, val, i) for i in views}
    for i, (begin, end, _) in enumerate(schedule):
        if max(begin, first) < end:
            jobs["train", i] = functools.partial(p.gradients.lower, like, batch(begin), begin, i)
    jobs["update"] = functools.partial(p.update.lower, p.like, like)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(jobs, pool.map(lambda lower: lower().compile(), jobs.values())))
    journal.say(f"compiled {len(jobs)} programs in {time.perf_counter() - began:.1f} s")
    state = state or p.init(jax.random.key(c.seed))

    def note(pending):
        """Writes a step down as soon as the device has finished it."""
        if pending:
            step, loss, norm = pending[0], float(pending[1]), float(pending[2])
            seconds = spent + time.perf_counter() - began
            show = step <= 5 or step % max(1, c.steps // 25) == 0
            journal.scalar(step, seconds, "train_loss", loss, show)
            journal.scalar(step, seconds, "grad_norm", norm)
            if not math.isfinite(loss + norm):
                raise ConfigError(
                    f"step {step}: loss {loss}, gradient {norm}: {run} keeps the last"
                )

    stopping = listen()
    loader = ThreadPoolExecutor(1)
    ahead, pending, began = loader.submit(batch, first), None, time.perf_counter()
    for step in range(first, c.steps + 1):
        last = step == c.steps
        saving, validating = (last or step % n == 0 for n in (c.save_every, c.val_every))
        if saving or validating or stopping(step):
            note(pending)
            pending, spent = None, spent + time.perf_counter() - began
            stop = stopping(step) and not last
            if step > first and (saving or stop):
                save(manager, state, step=step, train_time=spent)
            if stop:
                manager.wait_until_finished()
                journal.say(
                    f"stopped at step {step} on request: the same command goes on from here"
                )
                raise SystemExit(75)
            if validating:
                view = len(schedule) if last else c.stage(step)
                val_loss = float(compiled["val", view](state["params"], val))
                journal.scalar(step, spent, "val_loss", val_loss)
            began = time.perf_counter()
        if not last:
            rows, ahead = ahead.result(), loader.submit(batch, step + 1)
            loss, grads = compiled["train", c.stage(step)](state["params"], rows, step)
            state, norm = compiled["update"](state, grads)
            note(pending)
            pending = step + 1, loss, norm
    manager.wait_until_finished()
    text = write(c, p, state["params"], "\n", 256, 0.8, 50)
    journal.text(c.steps, "sample", text)
    journal.say(f"sample of {run}:\n{text}")
    return Result(val_loss, spent, run)


def write(c: Config, p: Program, params, prompt, n: int, temperature: float, top_k: int) -> str:
    """The prompt and n tokens that the model puts behind it."""
    ids = [c.bos, *data_fineweb.encode(prompt.encode(), c.vocab)]
    tokens = np.zeros((1, -(-(len(ids) + n) // 128) * 128), np.int32)
    tokens[0, : len(ids)] = ids
    stop, key = len(ids) + n, jax.random.key(c.seed)
    out = p.generate(params, tokens, len(ids), stop, key, temperature, min(top_k, c.vocab))
    return data_fineweb.decode(np.asarray(out)[0, :stop].tolist(), c.vocab)


def sample(c: Config, *, prompt="\n", tokens=256, temperature=0.8, top_k=50):
    """Prints text from the newest checkpoint of a run."""
    start(c)
    p = program(c, sharding.make_mesh(c.mesh))
    state, _ = restore(checkpoints(Path("runs") / c.run), p.like)
    print(write(c, p, state["params"], prompt, tokens, temperature, top_k))


COMMANDS = {"train": train, "sample": sample}


def main(argv: list[str]):
    """Runs a command line. Raises ConfigError, DataError or MeshError for what users can mend."""
    command = argv.pop(0) if argv and not argv[0].startswith("--") else "train"
    if {"-h", "--help"} & {command, *argv}:
        print(__doc__)
        return
    run = choose("command", command, COMMANDS)
    words = [arg.removeprefix("--").partition("=") for arg in argv]
    keys = {name: value if given else "true" for name, given, value in words}
    own = {}
    for name, argument in list(inspect.signature(run).parameters.items())[1:]:
        own[name] = typed(name, keys.pop(name, argument.default), argument.default)
    if command == "train" and "preset" not in keys:
        keys["preset"] = "speedrun" if accelerator() else "smoke"
        print(f"preset {keys['preset']}, as this machine has {accelerator() or 'no GPU or TPU'}")
    elif keys.get("run"):  # what the run was made with
        log = Path("runs", keys["run"], "log.txt")
        if log.exists():
            config = re.search(r"^config (.*)$", log.read_text(), re.MULTILINE)
            keys = json.loads(config[1]) | keys
    run(Config(**keys), **own)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, data_fineweb.DataError, sharding.MeshError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("out of device memory: try --device_rows=N with a smaller N", file=sys.stderr)
        sys.exit(2)
