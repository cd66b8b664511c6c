"""Text from a checkpoint: ./launch sample --run=NAME [--prompt=TEXT --tokens=256 --samples=1
--temperature=0.8 --top_k=50 --seed=0], and any key of Config that does not change the result.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import tiktoken
from jax import lax

import data_fineweb
import model
import sharding
import tool
import train_gpt
from sharding import InputError


def split(argv: list[str], own: dict) -> tuple[dict, dict]:
    """Our own keys, typed as in `own`, and those of Config."""
    keys = tool.keys_of(argv)
    for name in keys:
        train_gpt.choose("key", name, [*own, *train_gpt.FREE])
    mine = {n: train_gpt.typed(n, keys.pop(n, like), str(like)) for n, like in own.items()}
    return mine, keys


def saved(keys: dict) -> SimpleNamespace:
    """Config, mesh, program, parameters and step of --run's newest checkpoint, or InputError."""
    run = Path("runs", keys.get("run", ""))
    was, _ = train_gpt.configured(run)
    if not was:
        there = ", ".join(sorted(path.name for path in Path("runs").glob("*"))) or "none yet"
        raise InputError(f"--run={keys.get('run', '')}: no such run; there are: {there}")
    c = train_gpt.Config(**was | keys)
    train_gpt.start(c)
    mesh, p, _, state, meta = train_gpt.opened(c, run)
    if not state:
        raise InputError(f"{run} has no checkpoint yet")
    return SimpleNamespace(c=c, mesh=mesh, p=p, params=state["params"], step=meta["step"])


def logits_of(run):
    """(params, tokens (B, T), i) -> capped logits (B, V) of the word after token i."""
    whole = sharding.part()

    def local(params, tokens, i):
        w = run.p.use(params)
        x = model.features(w, tokens, run.c, run.p.views[-1])
        x = lax.dynamic_slice_in_dim(x, i, 1, 1)[:, 0]
        return 11.5 + 11.5 * model.cap(x @ w["head"].T)

    return jax.jit(sharding.by_rows(run.mesh, local, (run.p.parts, whole, whole), whole))


def decoded(tokens: list[int], vocab: int) -> str:
    """The text of tokens, less those that stand for none."""
    if vocab <= 50256:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")
    return tiktoken.get_encoding("r50k_base").decode([t for t in tokens if t < 50256])


def write(run, prompt: str, n: int, samples: int, temperature: float, top_k: int) -> list[str]:
    """The prompt and n tokens that the model puts behind it. One buffer, so compiled once; every
    token computes it all again, which at these sizes is less than a cache would take to move.
    """
    c, ids = run.c, [run.c.bos, *data_fineweb.encode(prompt.encode(), run.c.vocab)]
    room, stop = -(-(len(ids) + n) // 128) * 128, len(ids) + n
    if stop > c.val_long * 16:
        raise InputError(f"--prompt and --tokens are {stop} tokens together, at most 16 windows")
    logits = logits_of(run)
    tokens, rng = np.zeros((samples, room), np.int32), np.random.default_rng(c.seed)
    tokens[:, : len(ids)] = ids
    for i in range(len(ids), stop):
        z = np.array(logits(run.params, tokens, i - 1), np.float32) / max(temperature, 1e-6)
        z[z < np.sort(z)[:, -min(top_k, z.shape[1]), None]] = -np.inf
        tokens[:, i] = np.argmax(z + (temperature > 0) * rng.gumbel(size=z.shape), 1)
    return [decoded(row, c.vocab) for row in tokens[:, :stop].tolist()]


def main(argv: list[str]):
    own = {"prompt": "\n", "tokens": 256, "samples": 1, "temperature": 0.8, "top_k": 50}
    mine, keys = split(argv, own | {"seed": 0})
    seed = mine.pop("seed")
    if min(mine["tokens"], mine["samples"], mine["top_k"]) < 1:
        raise InputError("--tokens, --samples and --top_k are at least 1")
    run = saved(keys)
    run.c = train_gpt.Config(**vars(run.c) | {"seed": seed})
    began, texts = time.perf_counter(), write(run, *mine.values())
    spent = time.perf_counter() - began
    count = mine["tokens"] * mine["samples"]
    if jax.process_index() == 0:
        print(*texts, sep="\n" + "-" * 100 + "\n")
        print(f"{count} tokens, {count / spent:.0f} tokens/s with compiling", file=sys.stderr)


if __name__ == "__main__":
    tool.run(main)
