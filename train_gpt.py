"""NanoGPT speedrun in JAX: trains record #77's recipe to 3.28 validation loss on FineWeb.

python train_gpt.py [COMMAND] [--key=value ...]      (./launch does the same and sets up Python)

  train     the main job: preset speedrun where a GPU or TPU is found, else smoke on the CPU
  sample    --run=NAME [--prompt=TEXT --tokens=N --temperature=T --top_k=K]
Keys are the fields of Config below, for example --preset=smoke --steps=100 --mesh=data:2,fsdp:4.
"""

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
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import data_fineweb
import model
import muon
import sharding

HERE = Path(__file__).parent
SOURCES = ("launch", "train_gpt.py", "model.py", "muon.py", "data_fineweb.py", "sharding.py")


class ConfigError(ValueError):
    """Something the user can mend, in one line."""


class Stage(NamedTuple):
    """A row of the schedule."""

    end: float  # as a fraction of the run's steps
    tokens: int  # per step
    max_doc: int  # longer documents are cut
    short: int  # attention windows, in tokens
    long: int
    lr: float  # times the learning rates
    mtp: tuple  # weights of the next tokens' losses, at the start of the stage and at its end
    mtp_end: tuple


def scaled(stages, tokens: int, max_doc: int, window: int):
    """The table for a smaller model: batch, documents and windows in the same proportions."""
    return tuple(
        s._replace(
            tokens=s.tokens // 131072 * tokens,
            max_doc=s.max_doc * max_doc // 2048,
            short=s.short * window // 128,
            long=s.long * window // 128,
        )
        for s in stages
    )


SPEEDRUN = (
    Stage(483 / 1490, 131072, 896, 128, 384, 1.0, (1, 0.5, 0.25), (1, 0.5, 0)),
    Stage(967 / 1490, 262144, 2048, 384, 896, 1.52, (1, 0.5), (1, 0)),
    Stage(1450 / 1490, 393216, 2048, 640, 1408, 1.73, (1,), (1,)),
    Stage(1, 393216, 2048, 768, 1664, 1.0, (1,), (1,)),  # here lr has come down to its floor
)


@dataclasses.dataclass(frozen=True, init=False)
class Config:
    """Every key, with the values of the preset `speedrun`."""

    preset: str = "speedrun"
    data: str = "fineweb10B"  # or finewebedu10B, stdlib, a path to .bin shards or .txt files
    mesh: str = ""  # e.g. data:2,fsdp:2,tensor:2; empty: all devices on fsdp
    seed: int = 0
    steps: int = 1490  # the schedule scales with it
    val_every: int = 250
    save_every: int = 250
    run: str = ""  # name of the run to start or go on with; empty: a fresh one
    resume: bool = True
    device: str = "auto"  # cpu, gpu, tpu
    cpu_devices: int = 1  # virtual devices on the CPU
    float32: bool = False  # all arithmetic in float32
    target: float = 3.28
    device_rows: int = 1  # rows per device at once: less is less memory, never another result
    rows: int = 8  # a step's tokens are cut into so many rows
    layers: str = "p v pv ls . p k b v pv lv"  # see model.param_table
    width: int = 768
    heads: int = 6
    vocab: int = 50304
    bigram_rows: int = 5 * 50304
    muon_lr: float = 0.023
    adam_lr: float = 0.008
    val_tokens: int = 10_485_760
    val_row_tokens: int = 262_144
    val_long: int = 20 * 128  # long window of the last validation (record 33)
    bos: int = 50256  # token that starts a document
    momentum_rise: float = 300 / 1490  # of the steps, at the start
    momentum_fall: float = 50 / 1490  # of the steps, at the end
    lr_fall: float = 0.6  # of the steps before the last stage, at their end
    stages: tuple = SPEEDRUN

    def __init__(self, **keys):
        """Values from the preset, then from `keys`, as text or typed. Raises ConfigError."""
        known = {f.name: f.default for f in dataclasses.fields(Config)}
        preset = keys.get("preset", Config.preset)
        values = known | nearest(PRESETS, preset, "preset")
        for name, value in keys.items():
            values[name] = typed(name, value, nearest(known, name, "key"))
        self.__dict__.update(values)

    @property
    def dtype(self):
        return jnp.float32 if self.float32 else jnp.bfloat16

    @property
    def ends(self) -> list[int]:
        """Step at which each stage ends."""
        return [round(stage.end * self.steps) for stage in self.stages]

    def stage(self, step: int) -> int:
        return next((i for i, end in enumerate(self.ends) if step < end), len(self.stages) - 1)


PRESETS = {
    "speedrun": {},
    "smoke": dict(
        data="stdlib",
        steps=300,
        val_every=100,
        device="cpu",
        float32=True,
        device_rows=8,
        layers="p v ls k b pv lv",
        width=128,
        heads=4,
        vocab=264,
        bos=256,
        bigram_rows=4096,
        val_tokens=2**18,
        val_row_tokens=2**13,
        val_long=20 * 16,
        stages=scaled(SPEEDRUN, 2048, 1024, 16),
    ),
}
# Keys that cannot change the result, so that a run may go on with other values.
FREE = "mesh device_rows val_every save_every run resume device cpu_devices target".split()


def nearest(table: dict, name: str, what: str):
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, 1, 0)
    hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(table)}"
    raise ConfigError(f"unknown {what} '{name}': {hint}")


def typed(name: str, value, default):
    """`value` (perhaps text) in the type of the default."""
    kind = type(default)
    if kind is bool and value in ("true", "false"):
        return value == "true"
    try:
        if isinstance(value, kind):
            return value
        if kind in (int, float, str) and not isinstance(value, bool):
            return kind(value.replace("_", "") if kind is int and type(value) is str else value)
    except ValueError:
        pass
    wanted = "true or false" if kind is bool else kind.__name__
    raise ConfigError(f"--{name}={value}: expected {wanted}, as in --{name}={default}")


# ---------------------------------------------------------------- one step, as pure functions


def optimizers(c: Config, table, mesh):
    """Update rules by group: the recipe's schedules over the table's settings."""
    of = {
        group: {name: p for name, p in table.items() if p.group == group}
        for group in ("muon", "adam")
    }
    ends = c.ends
    cool = int((1 - c.lr_fall) * ends[-2])
    warm, slow = c.momentum_rise * c.steps, c.momentum_fall * c.steps

    def rate(base, step):
        lr = jnp.asarray([s.lr for s in c.stages])[
            jnp.searchsorted(jnp.asarray(ends), step, "right")
        ]
        t = jnp.clip((step - cool) / max(1, ends[-2] - cool), 0, 1)
        return base * (lr * (1 - t) + 0.15 * t)

    def momentum(step):
        return 0.85 + 0.1 * jnp.clip(jnp.minimum(step / warm, (c.steps - step) / slow), 0, 1)

    def settings(group, field):
        return {name: getattr(p, field) for name, p in of[group].items()}

    return {
        "muon": muon.normuon(
            functools.partial(rate, c.muon_lr),
            momentum,
            settings("muon", "lr"),
            dtype=c.dtype,
            split=functools.partial(sharding.spread, mesh),
        ),
        "adam": muon.adam(
            functools.partial(rate, c.adam_lr),
            settings("adam", "lr"),
            settings("adam", "betas"),
            settings("adam", "wd"),
        ),
    }


def views(c: Config) -> list[model.View]:
    """What each stage sets in the network; one more for the last validation, with its window."""
    K, longs = c.width // c.heads, [s.long for s in c.stages]
    yarns = [model.yarn(K, longs[: i + 1]) for i in range(len(longs))]
    each = [model.View(s.short, s.long, *y) for s, y in zip(c.stages, yarns)]
    return each + [each[-1]._replace(long=c.val_long)]


class Program(NamedTuple):
    """The functions of a config on a mesh. State: {"params", "muon", "adam", "step"}."""

    init: callable  # (key) -> state
    gradients: callable  # (params, rows, stage, mtp weights) -> per-token loss, gradients
    update: callable  # (state, gradients) -> state
    step: callable  # (state, rows, stage) -> state, {"train_loss", "grad_norm"}
    evaluate: callable  # (params, rows, view) -> mean loss
    placed: dict  # the sharding of each leaf of the state


def program(c: Config, mesh) -> Program:
    table = model.param_table(c)
    for name, p in table.items():
        sharding.check(mesh, name, p.shape, p.axes)
    sharding.check(mesh, "batch", [c.rows], ["rows"])
    rules, looks = optimizers(c, table, mesh), views(c)
    specs = {name: sharding.spec(p.axes) for name, p in table.items()}
    whole, by_rows = sharding.spec([]), sharding.spec(["rows"])

    def init(key):
        params = model.init(table, key)
        of = {g: {n: w for n, w in params.items() if table[n].group == g} for g in rules}
        state = {g: rule.init(of[g]) for g, rule in rules.items()}
        return state | {"params": params, "step": jnp.zeros((), jnp.int32)}

    def leaf_axes(path, leaf):
        name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        split = table[name].axes if name in table else ()
        return tuple(a if leaf.shape[i] > 1 else None for i, a in enumerate(split))

    shapes = jax.eval_shape(init, jax.random.key(0))
    leaf_placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding.placed(mesh, leaf_axes(path, leaf)), shapes
    )

    def gradients(params, rows, stage, weights):
        def local(params, rows, weights):
            w, pull = jax.vjp(lambda p: model.use(table, p, c.dtype), params)

            def some(carry, rows):
                value = jax.value_and_grad(model.loss)(w, rows, c, looks[stage], weights)
                return jax.tree.map(jnp.add, carry, value), None

            zero = jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), w)
            rows = rows.reshape(-1, min(c.device_rows, len(rows)), rows.shape[1])
            (loss, g), _ = jax.lax.scan(some, zero, rows)
            g = jax.tree.map(lambda g, w: (g / c.rows).astype(w.dtype), g, w)
            return sharding.total(loss, "rows"), pull(g)[0]

        f = sharding.spmd(local, mesh, (specs, by_rows, whole), (whole, specs))
        loss, grads = f(params, rows, weights)
        return loss / (c.rows * (rows.shape[1] - 1)), grads

    def update(state, grads):
        tied = state["step"] <= c.ends[1] | 1  # untied at two thirds, after an Adam step (51, 53)
        shared = grads["head"] + grads["embed"]  # equal gradients keep equal weights equal
        grads |= {n: jnp.where(tied, shared, grads[n]) for n in ("head", "embed")}
        new = {"step": state["step"] + 1}
        updates = {}
        for group, rule in rules.items():
            names = [n for n in table if table[n].group == group]
            of = [{n: tree[n] for n in names} for tree in (grads, state["params"])]
            u, new[group] = rule.update(of[0], state[group], of[1])
            updates |= u
        return new | {"params": optax.apply_updates(state["params"], updates)}

    def step(state, rows, stage):
        s = c.stages[stage]
        start, end = ([0] + c.ends)[stage : stage + 2]
        t = (state["step"] - start) / max(1, end - start)
        weights = (1 - t) * jnp.asarray(s.mtp, jnp.float32) + t * jnp.asarray(s.mtp_end)
        loss, grads = gradients(state["params"], rows, stage, weights)
        return update(state, grads), {"train_loss": loss, "grad_norm": optax.global_norm(grads)}

    def evaluate(params, rows, view):
        def local(params, rows):
            w = model.use(table, params, c.dtype)
            one = lambda row: model.loss(w, row[None], c, looks[view], jnp.ones(1))
            return sharding.total(jax.lax.map(one, rows).sum(), "rows")

        loss = sharding.spmd(local, mesh, (specs, by_rows), whole)(params, rows)
        return loss / (rows.shape[0] * (rows.shape[1] - 1))

    return Program(
        jax.jit(init, out_shardings=leaf_placed),
        jax.jit(gradients, static_argnums=2),
        jax.jit(update, out_shardings=leaf_placed),
        jax.jit(step, static_argnums=2, donate_argnums=0, out_shardings=(leaf_placed, None)),
        jax.jit(evaluate, static_argnums=2),
        leaf_placed,
    )
