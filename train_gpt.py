"""NanoGPT speedrun in JAX: record #77's recipe, whose aim is 3.28 validation loss on FineWeb.
python train_gpt.py [COMMAND] [--key=value ...]: no COMMAND is train, which has Config's keys; no
--preset is speedrun on a GPU or TPU, else smoke. The other commands are tests/COMMAND.py."""

import difflib
import json
import os
import re
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, raise_signal, signal
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax import lax, numpy as jnp
from tensorboard.summary import Writer

import data_fineweb
import model
import muon
import sharding
from sharding import InputError

HERE = Path(__file__).parent
SOURCES = ("launch", "train_gpt.py", "model.py", "muon.py", "data_fineweb.py", "sharding.py")
CODE = "".join((HERE / name).read_text() for name in SOURCES)  # what runs, whatever is edited then
COMMANDS = "train", "test", "sample", "eval", "record", "plot", "plan", "bench"  # tests/*.py
# Keys that cannot change the result: a run may go on with other values of them.
FREE = {*"mesh device_rows val_every save_every keep run resume device cpu_devices target".split()}
HINTS = {  # what errors of libraries say -> what to do
    "No space left|quota exceeded": "disk full, make room, and the same --run goes on:",
    "RESOURCE_EXHAUSTED": "out of device memory: try --device_rows=N, N smaller, or more --rows:",
    "initialize backend": "no such device for JAX:",
}
Result = namedtuple("Result", "val_loss train_time run_dir")  # nats, seconds, Path
# End (of all steps), tokens a step, longest document, windows, rates' factor, MTP weights from, to.
Stage, FLOOR = namedtuple("Stage", "end tokens max_doc short long lr mtp mtp_end"), 0.15
STAGES = {  # behind the second, head and embedding are untied; rates fall till a stage of FLOOR
    "speedrun": (  # the last row is the record's extension
        Stage(483 / 1490, 131072, 896, 128, 384, 1.0, (1, 0.5, 0.25), (1, 0.5, 0)),
        Stage(967 / 1490, 262144, 2048, 384, 896, 1.52, (1, 0.5), (1, 0)),
        Stage(1450 / 1490, 393216, 2048, 640, 1408, 1.73, (1,), (1,)),
        Stage(1, 393216, 2048, 768, 1664, FLOOR, (1,), (1,)),
    ),
    "smoke": (
        Stage(0.33, 768, 896, 16, 48, 1.0, (1, 0.5, 0.25), (1, 0.5, 0)),
        Stage(0.66, 1024, 1024, 32, 64, 1.52, (1, 0.5), (1, 0)),
        Stage(1, 1536, 1024, 32, 96, 1.73, (1,), (1,)),
    ),
}
# All keys with their defaults, as on the command line (README: what each is), and by preset.
KEYS = """preset=speedrun data=fineweb10B mesh= seed=0 steps=1490 val_every=250 save_every=250 run=
keep=2 resume=true device=auto cpu_devices=1 float32=false fp8=false target=3.28 device_rows=1
rows=8 stages=speedrun layers=p,v,pv,ls,o,p,k,b,v,pv,lv width=768 heads=6 vocab=50304 bos=50256
bigram_rows=251520 muon_lr=0.023 adam_lr=0.008 lr_fall=0.6 momentum_rise=0.2013423
momentum_fall=0.033557047 val_tokens=10485760 val_row_tokens=262144 val_long=2560"""
SMOKE = """data=stdlib device=cpu float32=true steps=420 val_every=420 device_rows=8 width=96
stages=smoke layers=pvs,k,b,lv heads=2 vocab=264 bos=256 bigram_rows=4096 muon_lr=0.08
adam_lr=0.015 val_tokens=131072 val_row_tokens=8192 val_long=192"""
PRESETS = {"speedrun": "", "smoke": SMOKE}
# Turns that a device takes for its n rows, at most device_rows at once (0 rows: one).
turns = lambda c, n: next(k for k in range(1, n + 2) if n % k == 0 and n // k <= c.device_rows)


class Config(SimpleNamespace):
    def __init__(self, **keys):
        """Every key: the preset's value or the given one, typed or text. Raises InputError."""
        words = lambda text: dict(word.split("=") for word in text.split())
        preset, like = choose("preset", keys.get("preset", "speedrun"), PRESETS), words(KEYS)
        values = like | words(PRESETS[preset]) | {choose("key", n, like): keys[n] for n in keys}
        super().__init__(**{name: typed(name, values[name], like[name]) for name in like})
        of = Stage(*zip(*STAGES[choose("stages", self.stages, STAGES)]))  # a tuple of each column
        needs = {
            "even --heads": self.heads % 2 == 0,
            "--width = 4 n heads > 11": self.width % (4 * self.heads) == 0 and self.width > 11,
            "--bos below --vocab and 65536": self.bos < min(self.vocab, 2**16),
            "--rows that divide the tokens of each stage": not any(np.array(of.tokens) % self.rows),
            "stages whose ends rise to 1": of.end[-1] == 1 and [*of.end] == sorted({*of.end}),
        }
        if unmet := [need for need, met in needs.items() if not met]:
            raise InputError(f"need {', '.join(unmet)}")

    def schedule(self) -> list[tuple[int, int, Stage]]:  # (first step, end, stage) of each
        ends = [round(stage.end * self.steps) for stage in STAGES[self.stages]]
        return list(zip([0, *ends], ends, STAGES[self.stages]))

    def stage(self, step: int) -> int:  # after the last step one more, with a view of its own
        return sum(step >= end for _, end, _ in self.schedule())


def choose(what: str, name: str, table):
    if name in table:
        return name
    near = difflib.get_close_matches(str(name), table, 1, 0)[0]
    raise InputError(f"unknown {what} '{name}': did you mean '{near}'? (see --help)")


def typed(name: str, value, like: str):  # `value`, perhaps text, of the kind that `like` is
    kinds = {"true or false": "(?i)true|false", "int above 0": r"[1-9]\d*", "int": r"(?!0.)\d{1,9}"}
    kinds |= {"float": r"(?i)(?!0\d)\d+(\.\d+)?(e[+-]?\d+)?", "layers": "[bklopsv,]+", "text": ".*"}
    kind = next(kind for kind, form in kinds.items() if re.fullmatch(form, like, re.S))
    if not re.fullmatch(kinds[kind], str(value), re.A | re.S):
        raise InputError(f"--{name}={value}: expected {kind}, like {like}")
    return str(value) if kind in ("layers", "text") else json.loads(str(value).lower())


def program(c: Config, mesh) -> SimpleNamespace:
    """init, gradients, update, evaluate, bits, on a mesh; `like`: the state's shapes and places."""
    table, schedule, stages = model.param_table(c), c.schedule(), STAGES[c.stages]
    device, dtype = mesh.devices.flat[0], jnp.float32 if c.float32 else jnp.bfloat16
    chip, K = f"{device.platform} {device.device_kind}", c.width // c.heads
    kernels = {"tpu": model.splash, "gpu": model.cudnn} if mesh.shape["tensor"] == 1 else {}
    attend, why = kernels.get(device.platform, model.attend), "" if kernels else ", for tensor > 1"
    if attend is model.cudnn:
        right, why = model.trusted(attend, K, dtype)
        attend = attend if ocp.multihost.broadcast_one_to_all(np.array(right)) else model.attend
    exact = {"xla_allow_excess_precision": False} if "gpu" in chip else {}  # predicted: -7% bytes
    vmem = {"xla_tpu_scoped_vmem_limit_kib": 49152} if "lite" in chip else {}  # and -5% cycles
    jit, jit_large = (partial(jax.jit, compiler_options=given) for given in (exact, exact | vmem))
    yarns = [model.yarn(K, [s.long for s in stages[: i + 1]]) for i in range(len(stages))]
    views = [model.View(s.short, s.long, *yarn, attend, chip) for s, yarn in zip(stages, yarns)]
    views.append(views[-1]._replace(long=c.val_long))  # behind the last step
    fallen, untie = max(e for _, e, s in schedule if s.lr > FLOOR), schedule[:2][-1][1] | 1  # odd
    steps, rise, back = np.arange(c.steps), max(c.momentum_rise, 1e-9), max(c.momentum_fall, 1e-9)
    fall = np.interp(steps, [int(fallen * (1 - c.lr_fall)), fallen], [0, 1])
    factor = np.array([stages[c.stage(i)].lr for i in steps]) * (1 - fall) + FLOOR * fall
    up = np.minimum(steps / rise, (c.steps - steps) / back) / c.steps
    at_step = lambda values: lambda step: jnp.asarray(values, jnp.float32)[step]
    some = lambda adam: {n: row for n, row in table.items() if bool(row.betas) == adam}
    rules = {"adam": muon.adam(some(True), at_step(c.adam_lr * factor))}
    rates = at_step(c.muon_lr * factor), at_step(0.85 + 0.1 * np.clip(up, 0, 1))
    rules["muon"] = muon.normuon(some(False), *rates, dtype, partial(sharding.spread, mesh))
    fresh = lambda params: {"params": params} | {n: rule.init(params) for n, rule in rules.items()}
    init = lambda seed: {"step": np.int32(0)} | fresh(model.init(table, jax.random.key(seed)))
    parts = {n: sharding.part(row.axes) for n, row in table.items()}
    cut, whole, by_rows = sharding.part(["rows"]), sharding.part(), partial(sharding.by_rows, mesh)
    use = lambda ws: {n: sharding.gathered(w, table[n].axes, dtype) for n, w in ws.items()}

    def gradients(params, rows, step, stage):  # -> loss per token, gradients
        start, end, s = schedule[stage]
        mtp = np.array(s.mtp) + (np.array(s.mtp_end) - s.mtp) * (step - start) / (end - start)

        def local(params, rows, mtp):
            w, pull = jax.vjp(use, params)
            turn = lambda rows: jax.value_and_grad(model.loss)(w, rows, c, views[stage], mtp, c.fp8)
            add = lambda sums, rows: (jax.tree.map(jnp.add, sums, turn(rows)), None)
            zeros = jnp.zeros(()), {n: jnp.zeros(x.shape) for n, x in w.items()}
            rows = rows.reshape(turns(c, len(rows)), -1, rows.shape[1])
            (loss, grads), _ = lax.scan(add, zeros, rows, unroll=len(rows) == 1)  # or XLA copies it
            (grads,) = pull({n: (g / c.rows).astype(w[n].dtype) for n, g in grads.items()})
            grads = {n: sharding.summed(g, table[n].axes) for n, g in grads.items()}
            return sharding.summed(loss) / (c.rows * (rows.shape[-1] - 1)), grads

        return by_rows(local, (parts, cut, whole), (whole, parts))(params, rows, mtp)

    def update(state, grads, odd):  # -> state, norm of the gradients; odd: is the step so, static
        params, step, new = state["params"], state["step"], {"step": state["step"] + 1}
        shared = grads["head"] + grads["embed"]  # of both, for both, while they are tied (51, 53)
        tied = {n: jnp.where(step <= untie, shared, grads[n]) for n in ("head", "embed")}
        for name, rule in rules.items():
            moves, new[name] = rule.update(grads | tied, state[name], params, step=step, odd=odd)
            params = params | {n: model.rounded(params[n] + x, table[n]) for n, x in moves.items()}
        return new | {"params": params}, jnp.sqrt(sum((g * g).sum() for g in grads.values()))

    def evaluate(params, rows, stage):  # -> loss per token
        loss = partial(model.loss, c=c, view=views[stage], mtp=jnp.ones(1))
        local = lambda ws, rows: sharding.summed(lax.map(partial(loss, use(ws)), rows[:, None]))
        return by_rows(local, (parts, cut), whole)(params, rows).sum() / rows[:, 1:].size

    def place(path, leaf):  # by the name in the table; a dimension of 1 is not split
        row = table.get(name := getattr(path[-1], "key", ""))
        axes = [a if size > 1 else None for a, size in zip(row.axes if row else (), leaf.shape)]
        return leaf.update(sharding=sharding.placed(mesh, axes, leaf.shape, name))

    like = jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, 0))
    at = jax.tree.map(lambda leaf: leaf.sharding, like)
    fns = {"init": jax.jit(init, out_shardings=at), "evaluate": jit(evaluate, static_argnums=2)}
    fns["bits"] = jax.jit(lambda s: sum(x.view(f"u{x.itemsize}").sum() for x in jax.tree.leaves(s)))
    fns["gradients"] = jit_large(gradients, static_argnums=3, out_shardings=(None, at["params"]))
    keep = {"donate_argnums": 0, "keep_unused": True}  # or even steps give up no old `pending`
    fns["update"] = jit(update, static_argnums=2, out_shardings=(at, None), **keep)
    return SimpleNamespace(like=like, views=views, use=use, parts=parts, why=why, **fns)


class Journal:  # the console, log.txt, metrics.csv and TensorBoard of a run, of process 0
    def __init__(self, run: Path, c: Config, meta: dict):
        self.c, self.run, self.other = c, run, jax.process_index() and tempfile.TemporaryDirectory()
        run = Path(self.other.name) if self.other else run  # where nobody looks
        sys.modules["tensorboard.compat.notf"] = sys  # it need not import TensorFlow
        self.board = Writer(f"{run}/tensorboard")
        self.log, self.csv = (run / "log.txt").open("a"), (run / "metrics.csv").open("a")
        self.log.truncate(min(meta["log"], self.log.tell()))  # drops what came after the checkpoint
        self.csv.truncate(min(meta["csv"], self.csv.tell()))
        if not meta["step"]:
            self.say(CODE + "=" * 100, False)
            on = f", {jax.device_count()} {jax.devices()[0].device_kind}, JAX {jax.__version__}"
            self.say(f"Python {sys.version}{on}\nconfig {json.dumps(vars(c))}\n{'=' * 100}", False)
            print("step,train_time_ms,name,value", file=self.csv, flush=True)

    def say(self, line: str, show: bool = True):
        for file in [self.log] + [sys.stdout] * (show and not self.other):
            with suppress(OSError if file is sys.stdout else ()):  # it may close before we end
                print(line, file=file, flush=True)

    def scalar(self, step: int, ms: float, name: str, value: float, show: bool = True):
        if not np.isfinite(value):  # not written, so that the run is not done
            raise InputError(f"{self.run}: step {step}: {name} {value}: the run is as last saved")
        if name.endswith("loss"):
            times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
            self.say(f"step:{step}/{self.c.steps} {name}:{value:.4f} {times}", show)
        print(f"{step},{ms:.0f},{name},{value}", file=self.csv, flush=True)
        self.board.add_scalar(name, value, step)


def accelerator() -> str:  # what this machine has, whatever JAX can use of it
    ids = "PCI_ID=1AE0:00(27|5E|62|63|6F|76)\n"  # Google's network cards are no TPUs
    tpu = any(re.search(ids, p.read_text()) for p in Path("/sys/bus/pci").glob("devices/*/uevent"))
    return "GPU" if any(Path("/dev").glob("nvidia[0-9]*")) else "TPU" if tpu else ""


def start(c: Config):
    """Sets JAX up, once per Python process. Raises InputError on a silent fall to the CPU."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(HERE / ".cache/jax"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", "highest" if c.float32 else None)
    try:
        on = {"auto": jax.config.jax_platforms, "cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu"}
        jax.config.update("jax_platforms", on[choose("device", c.device, on)])
        jax.config.update("jax_num_cpu_devices", c.cpu_devices)
        ThreadPoolExecutor(1).submit(sharding.start_processes).result()  # so signals are heard
    except (RuntimeError, LookupError, ValueError) as error:
        if "before any" not in str(error):  # JAX is in use already, as in a notebook or a test
            raise InputError(f"cannot join the job (variables, port?): {error!r}") from error
    if jax.default_backend() == "cpu" != c.device and (c.device != "auto" or accelerator()):
        how = "install JAX's plugin (./launch does), end what else holds it, or say --device=cpu"
        raise InputError(f"JAX sees the CPU alone and no {accelerator() or c.device}: {how}")


def opened(c: Config, run: Path, p: SimpleNamespace, clean: bool = False):
    """Manager, `clean` of killed saves; state, meta of the newest readable checkpoint, or new."""
    options = ocp.CheckpointManagerOptions(max_to_keep=c.keep, cleanup_tmp_directories=clean)
    manager = ocp.CheckpointManager(path := run.absolute() / "checkpoints", options=options)
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = manager.restore(step, args=ocp.args.StandardRestore(p.like))
            if int(p.bits(state)) != (meta := manager.metadata(step).custom_metadata)["bits"]:
                raise ValueError("it is not what was saved")  # orbax has no checksum
            return manager, state, meta
        except Exception as error:  # whatever it is that the library stumbles over
            if step == min(manager.all_steps()) or jax.process_count() > 1:  # others may wait here
                raise InputError(f"{path}/{step} unreadable, remove it? {error!s:.200}") from error
            print(f"warning: checkpoint {step} unreadable, passed over: {error!s:.200}", flush=True)
    return manager, p.init(c.seed), {"step": 0, "train_time": 0.0, "log": 0, "csv": 0}


def configured(run: Path) -> tuple[dict, str]:
    """The config and the log of a run, both empty if there is none. Raises InputError."""
    log = (run / "log.txt").read_text(errors="replace") if (run / "log.txt").exists() else ""
    found = re.search(r"^config (\{.*\})$", log, re.MULTILINE)
    with suppress(ValueError):
        if found or not any(run.glob("checkpoints/*")):
            return json.loads(found[1]) if found else {}, log
    raise InputError(f"{run}/log.txt has lost the run's config: choose another --run")


def train(c: Config, stop=lambda step: False) -> Result:
    """Trains, or goes on with the run, to the last step; if `stop(step)`, saves and exits, 75."""
    start(c)
    fresh = f"{c.run}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9}".strip("-")
    name = np.frombuffer(f"{c.run if c.run and c.resume else fresh:240}".encode(), np.uint8)
    run = Path("runs", bytes(ocp.multihost.broadcast_one_to_all(name)).decode().strip())
    if "[" in f"{run.absolute()}":  # orbax takes it for a pattern, and finds no checkpoint again
        raise InputError(f"{run.absolute()}: checkpoints need a path without a bracket")
    (was, log), now, schedule = configured(run), vars(c), c.schedule()
    differ = [f"{k} was {was.get(k)}" for k in now if k not in FREE and was.get(k) != now[k]]
    if was and differ:
        raise InputError(f"{run} is there already, {', '.join(differ)}: try another --run")
    if was and not (log.startswith(CODE) or jax.process_index()):
        print(f"warning: {run} was begun by other sources, which its log has", flush=True)
    if done := re.search(rf"^step:{c.steps}/.* val_loss:(\S+) train_time:(\d+).*$", log, re.M):
        print(done[0], flush=True)
        return Result(float(done[1]), int(done[2]) / 1000, run)
    mesh, corpus = sharding.make_mesh(c.mesh), data_fineweb.open_corpus(c.data, c.vocab, c.bos)
    stages = [schedule[c.stage(step)][2] for step in range(c.steps)]
    plan = data_fineweb.plan(corpus, [(s.tokens // c.rows, s.max_doc, c.rows) for s in stages])
    held_out = data_fineweb.validation(corpus, c.val_tokens, c.val_row_tokens, c.rows)
    p, val = program(c, mesh), sharding.global_rows(mesh, held_out.shape, held_out.__getitem__)
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / f".lock{jax.process_index()}").open("a")
    try:  # so that no other goes on with the run while this one does
        os.lockf(lock.fileno(), os.F_TLOCK, 0)
    except OSError as error:
        if isinstance(error, BlockingIOError):  # not a file system without locks
            raise InputError(f"{run} is in training: end that, or choose another --run") from error
    manager, state, meta = opened(c, run, p, clean=True)
    data = int(held_out.sum() + plan[-1](slice(None)).sum()) % 2**31
    if meta.get("data", int(ocp.multihost.broadcast_one_to_all(np.array(data)))) != data:
        raise InputError(f"{run} was begun with other tokens: mend --data, or choose another --run")
    batch = lambda i: sharding.global_rows(mesh, (c.rows, stages[i].tokens // c.rows + 1), plan[i])
    first, spent, journal = meta["step"], meta["train_time"], Journal(run, c, meta)
    began, weights, n = time.perf_counter(), p.like["params"], sharding.ways(mesh, "rows")
    each = f"{n} devices x {c.rows // n // (k := turns(c, c.rows // n))} row x {k} accumulation"
    journal.say(f"{run}: {[s.tokens for *_, s in schedule]} tokens/step = {c.rows} rows = {each}")
    trained = {c.stage(k): k for k in reversed(range(first, c.steps))}  # stages' first steps
    validated = {c.stage(k) for k in [*range(0, c.steps, c.val_every), c.steps] if k >= first}
    jobs = {("update", odd): (p.update, p.like, weights, odd) for odd in (0, 1)}
    jobs |= {("train", i): (p.gradients, weights, batch(k), 0, i) for i, k in trained.items()}
    jobs |= {("val", i): (p.evaluate, weights, val, i) for i in validated}
    journal.say(f"attention by {p.views[0].attend.__name__}{p.why}; compiling {len(jobs)} programs")
    pool = ThreadPoolExecutor(1 if "gpu" in p.views[0].chip else None)  # XLA times kernels there
    compiled = dict(zip(jobs, pool.map(lambda f: f[0].lower(*f[1:]).compile(), jobs.values())))
    ocp.multihost.get_barrier_sync_fn()(key="all have compiled", timeout_ms=3600_000)  # Gloo: 30 s
    journal.say(f"compiled in {time.perf_counter() - began:.1f} s")
    for i, k in trained.items():  # a first call takes longer
        _, *grads = jax.block_until_ready(compiled["train", i](state["params"], batch(k), 0))
        jax.block_until_ready(compiled["update", i % 2](jax.tree.map(jnp.copy, state), grads.pop()))

    def note(step, loss, norm):  # waits for the device
        loss, norm, ms = float(loss), float(norm), 1000 * (spent + time.perf_counter() - began)
        journal.scalar(step, ms, "train_loss", loss, step < 6 or step % -(-c.steps // 25) == 0)
        journal.scalar(step, ms, "grad_norm", norm)

    early = any([stop(k) for k in range(first)])  # JAX must be asked of each, in turn
    pending, began = (), time.perf_counter()
    with lock, closing(manager), closing(journal.board):  # whatever comes, a begun save ends
        for step in range(first, c.steps + 1):
            last, stopped = step == c.steps, step < c.steps and (stop(step) or early)
            validating, saving = last or step % c.val_every == 0, last or step % c.save_every == 0
            if stopped or saving or validating:
                pending = pending and note(*pending)
                spent += time.perf_counter() - began
                if (stopped or saving) and step > first:  # before validation, which could fail
                    manager.wait_until_finished()  # the one before, or its room would look free
                    need = 2**20 + 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
                    if (disk := os.statvfs(run)).f_blocks and disk.f_bavail * disk.f_frsize < need:
                        raise InputError(f"{run}: disk full: a save takes {need / 1e6:.0f} MB")
                    for late in [n for n in manager.all_steps() if n > meta["step"]]:  # unreadable
                        manager.delete(late)
                    meta = {"log": journal.log.tell(), "csv": journal.csv.tell(), "data": data}
                    meta |= {"step": step, "train_time": spent, "bits": int(p.bits(state))}
                    manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=meta)
                if stopped or last:  # safe before a line says that the run is done
                    manager.wait_until_finished()
                if stopped:
                    journal.say(f"stopped after step {step}: the same --run goes on, {run}")
                    sys.exit(75)
                if validating:
                    val_loss = float(compiled["val", c.stage(step)](state["params"], val))
                    journal.scalar(step, 1000 * spent, "val_loss", val_loss)
                began = time.perf_counter()
            if not last:
                loss, *grads = compiled["train", c.stage(step)](state["params"], batch(step), step)
                state, norm = compiled["update", step % 2](state, grads.pop())  # no name keeps them
                pending = pending and note(*pending)  # one step late, so the device never waits
                pending = step + 1, loss, norm
    return Result(val_loss, spent, run)


def main(argv: list[str]):
    """Runs a command line. Raises InputError, DataError or OSError for what users can mend."""
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    if command == "train" and {"-h", "--help"} & {*argv}:
        return print(__doc__, "Keys, with their defaults:", KEYS, sep="\n")
    if choose("command", command, COMMANDS) != "train":
        os.execv(sys.executable, [sys.executable, str(HERE / f"tests/{command}.py"), *argv])
    keys = dict((w if "=" in w else f"{w}=true").removeprefix("--").split("=", 1) for w in argv)
    if "preset" not in keys:
        has = accelerator() if keys.get("device") != "cpu" else ""
        keys["preset"] = "speedrun" if has else "smoke"
        print(f"preset {keys['preset']}, as this machine has {has or 'no GPU or TPU'}", flush=True)
    c, heard = Config(**keys), []
    signal(SIGTERM, lambda n, _: heard.append(signal(n, SIG_DFL)))  # a second one kills
    for n in [SIGINT] + [SIGHUP] * (getsignal(SIGHUP) != SIG_IGN):  # no nohup; JAX hears SIGTERM
        signal(n, lambda n, _: (signal(n, SIG_DFL), signal(SIGHUP, SIG_IGN), raise_signal(SIGTERM)))
    stop = lambda step: ocp.multihost.reached_preemption(step) or heard and jax.process_count() == 1
    c.run = os.path.relpath(train(c, stop).run_dir, "runs")
    if jax.process_count() == 1 and (HERE / "tests/sample.py").exists():
        os.closerange(3, 2**16)  # or the sample, which replaces this process, finds its TPU taken
        main(["sample", "--end", *(f"--{n}={v}" for n, v in vars(c).items() if n in FREE)])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:  # DataError is the same as InputError
        hints = [hint for words, hint in HINTS.items() if re.search(words, str(error))]
        line = " ".join([*hints[:1], str(error).strip().partition("\n")[0]])
        mendable = bool(hints) or isinstance(error, (InputError, OSError))
        print(line, file=sys.stderr) if mendable else sys.excepthook(*sys.exc_info())
        time.sleep(0 if mendable else 1)  # so that its cause, another process, ends before it
        os._exit(2 if mendable else 1)  # sys.exit would wait, for minutes, for processes that wait
