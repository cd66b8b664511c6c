"""Runs the reference's steps with this project's code and compares: python tests/parity.py DIR.

DIR is laid out like reference/A: config.json, init.npz, batches.npz, expected.npz, from a float32
run of record #77's own code at a reduced size. Everything about it is read from config.json.
`python tests/parity.py --loader DIR SHARD...` compares the packing of those shards instead with
DIR/loader.npz and loader.json, laid out like reference/loader. `--full` compares losses and
gradients of one row at the size of speedrun (11 GB of memory). All end with one line of errors.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

import data_fineweb
import sharding
import tool
import train_gpt

BARS = {"loss": 2e-5, "gradient": 2e-3, "parameter": 1e-4}


def config_of(spec: dict) -> train_gpt.Config:
    """The Config that a reference directory's config.json describes."""
    L, sizes = spec["num_layers"], spec["sizes"]
    words = ["" for _ in range(L)]
    letters = {"p": "paired_layers", "l": "long_window_layers", "v": "ve_layers"}
    for letter, key in letters.items():
        for i in spec[key]:
            words[i] += letter
    (skip,) = set(range(L)) - set(spec["attention_layers"])
    words[skip] += "k"
    words[spec.get("skip_from", 3)] += "s"
    words[spec.get("backout_layer", 7)] += "b"
    stages = []
    for i, (start, end) in enumerate(spec["stage_boundaries"]):
        first = np.array(spec["schedule"][start]["mtp_weights"])
        slope = spec["schedule"][min(start + 1, end - 1)]["mtp_weights"] - first
        short, long = (w * spec["block_tokens"] for w in spec["window_blocks"][i])
        stages.append(
            train_gpt.Stage(
                end=end / spec["total_steps"],
                tokens=spec["sequences_per_step"] * sizes["seq_len"][i],
                max_doc=sizes["max_doc"][i],
                short=short,
                long=long,
                lr=[*spec["lr_mul_stages"][:-1], train_gpt.FLOOR][i],  # the last is the extension
                mtp=tuple(first.tolist()),
                mtp_end=tuple((first + slope * (end - start)).tolist()),
            )
        )
    muon, adam = (
        next(p["base_lr"] for p in spec["parameters"] if p["optimizer"] == kind)
        for kind in ("normuon", "adam")
    )
    train_gpt.STAGES["reference"] = tuple(stages)
    return train_gpt.Config(
        steps=spec["total_steps"],
        rows=spec["sequences_per_step"],
        device_rows=spec["sequences_per_step"],
        layers=",".join(word or "o" for word in words),
        width=spec["model_dim"],
        heads=sizes["heads"],
        vocab=sizes["vocab"],
        bos=sizes["bos_id"],
        bigram_rows=sizes["bigram_rows"],
        muon_lr=muon,
        adam_lr=adam,
        momentum_rise=spec["momentum"]["warmup_steps"] / spec["total_steps"],
        momentum_fall=spec["momentum"]["cooldown_steps"] / spec["total_steps"],
        lr_fall=spec["cooldown_frac"],
        val_long=spec["final_validation_windows"][1] * spec["block_tokens"],
        stages="reference",
        float32=True,
    )


def head_order(K: int) -> np.ndarray:
    """Where our head dims stand in the record's: it rotates interleaved pairs, we rotate halves."""
    half = K // 2
    pairs = np.arange(half).reshape(-1, 2)
    still = np.arange(half, K).reshape(2, -1)
    return np.concatenate([pairs[:, 0], still[0], pairs[:, 1], still[1]])


VALUES = [f"value{i}" for i in range(5)]


def ours(theirs: dict, c: train_gpt.Config) -> dict:
    """The record's arrays (parameters or gradients) under our names and in our layout."""
    D, L, K = c.width, len(c.layers.split(",")), c.width // c.heads
    heads = np.arange(c.heads).reshape(2, -1).T.ravel()  # it pairs h and h + H/2, we neighbours
    order, dims = ((heads[:, None] * K + each).ravel() for each in (head_order(K), np.arange(K)))
    attn = theirs["attn_bank"].reshape(-1, 4, D, D)
    qkv = np.stack([attn[:, 0, order], attn[:, 1, order], attn[:, 2, dims]], 1)
    scalars = theirs["scalars"]
    return {
        "qkv": qkv,
        "out": attn[:, 3][..., dims],
        "up": theirs["mlp_bank"][:L, 0],
        "down": theirs["mlp_bank"][:L, 1],
        "head": theirs["lm_head.weight"].T,
        "embed": theirs["embed.weight"],
        **dict(zip(VALUES, theirs["value_embeds"].reshape(-1, c.vocab, D)[..., dims])),
        "bigram": theirs["bigram_embed.weight"],
        "attn_gate": theirs["attn_gate_bank"][:, heads],
        "value_gate": theirs["ve_gate_bank"][:, heads],
        "smear_gate": theirs["smear_gate.weight"],
        "skip_gate": theirs["skip_gate.weight"],
        "qkv_scale": scalars[: 2 * L : 2],
        "out_scale": scalars[1 : 2 * L : 2],
        "smear": scalars[2 * L],
        "backout": scalars[2 * L + 1],
        "skip": scalars[2 * L + 2],
        "resid": theirs["resid_lambdas"],
        "post": theirs["post_lambdas"],
        "x0_inject": theirs["x0_lambdas"],
        "bigram_inject": theirs["bigram_lambdas"],
    }


THEIR_NAMES = {
    "value_embeds": VALUES,
    "attn_gate_bank": ["attn_gate"],
    "ve_gate_bank": ["value_gate"],
    "attn_bank": ["qkv", "out"],
    "mlp_bank": ["up", "down"],
    "post_lambdas": ["post"],
    "x0_lambdas": ["x0_inject"],
    "bigram_lambdas": ["bigram_inject"],
    "resid_lambdas": ["resid"],
    "scalars": ["qkv_scale", "out_scale", "smear", "backout", "skip"],
    "smear_gate.weight": ["smear_gate"],
    "skip_gate.weight": ["skip_gate"],
    "lm_head.weight": ["head"],
    "embed.weight": ["embed"],
    "bigram_embed.weight": ["bigram"],
}


square = lambda x: float(np.sum(np.square(np.asarray(x, np.float64))))  # of the norm


def norms(arrays: dict, names) -> np.ndarray:
    """L2 norms, by the record's parameter names."""
    squares = {k: square(v) for k, v in arrays.items()}
    return np.array([sum(squares[k] for k in THEIR_NAMES[name]) ** 0.5 for name in names])


def rows_of(batches, prefix: str) -> np.ndarray:
    inputs, targets = (np.atleast_2d(batches[f"{prefix}/{k}"]) for k in ("inputs", "targets"))
    return np.concatenate([inputs, targets[:, -1:]], 1).astype(np.uint16)


def rms_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30))


def run(directory, mesh="", steps=None, report=print, **keys) -> dict:
    """Trains the reference's steps; returns the worst error of each kind."""
    folder = Path(directory)
    spec = json.loads((folder / "config.json").read_text())
    start, batches, want = (
        np.load(folder / f"{name}.npz") for name in ("init", "batches", "expected")
    )
    c = config_of(spec)
    if keys:
        c = train_gpt.Config(**vars(c) | keys)
    mesh = sharding.make_mesh(mesh or "fsdp:1")
    p = train_gpt.program(c, mesh)
    place = {k: x.sharding for k, x in p.like["params"].items()}
    names = [str(name) for name in want["param_names"]]
    init = ours({name: start[name] for name in start.files}, c)
    state = p.init(0)
    state["params"] = {
        k: jax.device_put(np.asarray(w, np.float32), place[k]) for k, w in init.items()
    }
    val = rows_of(batches, "val")
    if len(val) % sharding.ways(mesh, "rows"):
        val = np.repeat(val, sharding.ways(mesh, "rows"), 0)
    worst = dict.fromkeys(["loss", "gradient", "parameter"], 0.0)
    first = {k: np.asarray(v) for k, v in init.items()}

    def see(kind, got, expected):
        error = float(np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)))
        worst[kind] = float(np.maximum(worst[kind], error))  # max would pass over a NaN
        return error

    def full(prefix, grads):
        """Whole arrays, where the directory has them: rms, which a few flipped elements bear."""
        for name in names:
            theirs = {n: np.zeros(start[n].shape) for n in names}
            if f"{prefix}/{name}" not in want.files:
                continue
            theirs[name] = want[f"{prefix}/{name}"]
            for k in THEIR_NAMES[name]:
                error = rms_error(grads[k], ours(theirs, c)[k])
                kind = "full " + prefix.split("/")[1]
                worst[kind] = float(np.maximum(worst.get(kind, 0.0), error))

    report(
        "step  train loss  expected    error     worst gradient      worst parameter   val error"
    )
    for step in range(spec["total_steps"] if steps is None else steps):
        stage = c.stage(step)
        loss_val = float(p.evaluate(state["params"], val, stage))
        val_error = see("loss", loss_val, want["val_loss"][step])
        rows = rows_of(batches, f"step{step}")
        loss, device_grads = p.gradients(state["params"], rows, step, stage)
        grads = {k: np.array(g) for k, g in device_grads.items()}
        expected = want["train_loss_sum"][step].sum() / (rows.shape[0] * (rows.shape[1] - 1))
        error = see("loss", float(loss), expected)
        got, wanted = norms(grads, names), want["grad_norm_this_step"][step]
        see("gradient", got, wanted)
        g = int(np.argmax(np.abs(got - wanted) / np.maximum(np.abs(wanted), 1e-30)))
        full(f"step{step}/grad", grads)
        state, _ = p.update(state, device_grads, step % 2)
        params = {k: np.asarray(v) for k, v in state["params"].items()}
        got_p, wanted_p = norms(params, names), want["param_norm_after"][step]
        see("parameter", got_p, wanted_p)
        full(f"step{step}/param_delta", {k: params[k] - first[k] for k in params})
        full(f"step{step}/param_after", params)
        q = int(np.argmax(np.abs(got_p - wanted_p) / np.maximum(np.abs(wanted_p), 1e-30)))
        report(
            f"{step:4d}  {float(loss):10.6f}  {expected:9.6f}  {error:8.1e}"
            f"  {abs(got[g] / wanted[g] - 1):8.1e} {names[g]:18s}"
            f" {abs(got_p[q] / wanted_p[q] - 1):8.1e} {names[q]:15s} {val_error:8.1e}"
        )
    if steps is None:
        last = float(p.evaluate(state["params"], val, len(c.schedule())))
        see("loss", last, want["val_loss"][-1])
        report(f" end  val {last:.6f}, expected {want['val_loss'][-1]:.6f}")
    return worst


def loader(directory, shards, report=print) -> int:
    """Compares packed rows with the original's, token for token; returns how many differ."""
    folder = Path(directory)
    want, spans = np.load(folder / "loader.npz"), json.loads((folder / "loader.json").read_text())
    shards = [Path(shard) for shard in shards]
    groups = {"train": shards, "switch": sorted(folder.glob("switch*.bin")), "val": shards}
    wrong = seen = 0
    for group, paths in groups.items():
        names = {key.split("/")[0] for key in want.files if key.startswith(group + "_")}
        names = sorted(names, key=lambda name: int(name.strip("abcdefghijklmnopqrstuvwxyz_")))
        if not (names and paths):
            continue
        read = partial(data_fineweb.read_shard, vocab=50304)
        corpus = data_fineweb.Corpus(paths, paths[0], 50256, read)
        expected = [np.hstack([want[n + "/inputs"], want[n + "/targets"][:, -1:]]) for n in names]
        if group == "val":
            T = expected[0].shape[1] - 1
            rows = data_fineweb.validation(corpus, sum(len(e) for e in expected) * T, T)
            got = np.split(rows, len(expected))
        else:
            longest = {}  # of the documents that a row length was packed from: where they were cut
            for span in spans[group]:
                T = expected[span["step"]].shape[1] - 1
                lengths = np.subtract(span["doc_ends"], span["doc_starts"])
                longest[T] = max(longest.get(T, 0), int(lengths.max()))
            steps = [(e.shape[1] - 1, longest[e.shape[1] - 1], len(e)) for e in expected]
            got = [batch(slice(None)) for batch in data_fineweb.plan(corpus, steps)]
        for name, a, b in zip(names, got, expected):
            differ = int((a != b).sum()) if a.shape == b.shape else b.size
            report(f"{name:14s} {b.size:8d} tokens  {differ} differ")
            wrong, seen = wrong + differ, seen + b.size
    if not seen:
        raise SystemExit("parity: loader: no shard was given, and there is none of the reference's")
    return wrong


def random_weights(c: train_gpt.Config) -> dict:
    """Weights of speedrun's size in the record's layout, none of them 0, the same everywhere."""
    rng, D, L, V = np.random.default_rng(0), c.width, len(c.layers.split(",")), c.vocab
    normal = lambda scale, *shape: scale * rng.standard_normal(shape, np.float32)
    head = normal(0.005, D, V)
    return {
        "attn_bank": normal(0.02, L - 1, 4 * D, D),
        "mlp_bank": normal(0.02, L, 2, 4 * D, D),
        "lm_head.weight": head,
        "embed.weight": head.T,
        "value_embeds": normal(0.2, 5 * V, D),
        "bigram_embed.weight": normal(0.3, c.bigram_rows, D),
        "attn_gate_bank": normal(0.2, L - 1, c.heads, 12),
        "ve_gate_bank": normal(0.2, 5, c.heads, 12),
        "smear_gate.weight": normal(0.2, 1, 12),
        "skip_gate.weight": normal(0.2, 1, 12),
        "scalars": np.append(np.tile([0.5, 1], L), [0, 0.5, -1.5]) + normal(0.1, 2 * L + 3),
        "post_lambdas": 1 + normal(0.1, L, 2),
        "resid_lambdas": 1.1**0.5 + normal(0.05, L, 2),
        "x0_lambdas": normal(0.1, L),
        "bigram_lambdas": 0.05 + normal(0.03, L),
    }


def full_size(report=print) -> float:
    """The worst relative error at speedrun's size, of the losses and gradients of one row of 2048
    tokens with four documents in the second stage: norm of each array, and 256 of its elements."""
    want = np.load(Path(__file__).with_name("data") / "full.npz")
    c = train_gpt.Config(float32=True, rows=1)
    mesh = sharding.make_mesh("fsdp:1")
    p = train_gpt.program(c, mesh)
    weights = ours(random_weights(c), c)
    params = {k: jax.numpy.asarray(np.asarray(w, np.float32)) for k, w in weights.items()}
    del weights  # 2 GB
    rows, stage = want["row"][None], 1
    losses = {"val": p.evaluate(params, rows, stage)}
    losses["train"], grads = p.gradients(params, rows, c.schedule()[stage][0], stage)
    errors = {k: abs(float(x) / float(want[k]) - 1) for k, x in losses.items()}
    for k in list(grads):
        g = np.asarray(grads.pop(k))
        elements = rms_error(g.ravel()[want["at " + k]], want["of " + k])
        errors[k] = np.maximum(abs(square(g) ** 0.5 / want["norm " + k] - 1), elements)
    for k, error in errors.items():
        report(f"{k:14s} {error:8.1e}")
    return float(np.max([*errors.values()]))


def main(argv) -> int:
    if not argv:
        raise sharding.InputError("parity: of which folder, like tests/data/A? See --help")
    jax.config.update("jax_platforms", "cpu")
    if argv[0] == "--loader":
        wrong = loader(argv[1], argv[2:])
        print(f"parity: loader: {wrong} tokens differ")
        return 1 if wrong else 0
    if argv[0] == "--full":
        jax.config.update("jax_default_matmul_precision", "highest")
        worst = full_size()
        print(f"parity: full size: worst error {worst:.1e}")
        return 0 if worst <= BARS["loss"] else 1
    worst = run(argv[0])
    missed = [kind for kind, bar in BARS.items() if not worst[kind] <= bar]
    errors = ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items())
    print(f"parity: {'missed' if missed else 'held'}: worst errors: {errors}")
    return 1 if missed else 0


if __name__ == "__main__":
    tool.run(main)
