"""Text from a checkpoint: ./launch sample --run=NAME [--prompt=TEXT --tokens=256 --samples=1
--temperature=0.8 --top_k=50 --seed=0], and any key of Config that does not change the result.
--end: after a training; what fails is a warning, as the training itself is done.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
if "--end" in sys.argv:  # the training is done, whatever comes
    no = b"warning: no sample, as it was stopped\n"
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: (os.write(2, no), os._exit(0)))

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
    """Config, mesh, program, parameters and step of --run's newest checkpoint, and the view of its
    stage, which is the one that the model knows. Raises InputError.
    """
    run = Path("runs", keys.get("run", ""))
    was, _ = train_gpt.configured(run)
    if not was:
        there = ", ".join(tool.runs()) or "none yet"
        raise InputError(f"--run={keys.get('run', '')}: no such run; there are: {there}")
    c = train_gpt.Config(**was | keys)
    train_gpt.start(c)
    mesh = sharding.make_mesh(c.mesh)
    p = train_gpt.program(c, mesh)
    _, state, meta = train_gpt.opened(c, run, p)
    if not meta["step"]:
        raise InputError(f"{run} has no checkpoint yet")
    view, step = p.views[c.stage(meta["step"])], meta["step"]
    return SimpleNamespace(c=c, mesh=mesh, p=p, params=state["params"], step=step, view=view)


def logits_of(run):
    """(params, tokens (B, T), i) -> capped logits (B, V) of the word after token i."""
    whole = sharding.part()

    def local(params, tokens, i):
        w = run.p.use(params)
        x = model.features(w, tokens, run.c, run.view)
        x = lax.dynamic_slice_in_dim(x, i, 1, 1)[:, 0]
        return 11.5 + 11.5 * model.cap(x @ w["head"].T)

    return jax.jit(sharding.by_rows(run.mesh, local, (run.p.parts, whole, whole), whole))


def words(vocab: int):
    """GPT-2's encoding where the vocabulary has it, else None: bytes. Raises InputError."""
    try:  # the first time on a machine tiktoken downloads it
        return tiktoken.get_encoding("r50k_base") if vocab > 50256 else None
    except Exception as error:  # of several HTTP libraries
        how = "it takes a network, or TIKTOKEN_CACHE_DIR=FOLDER with what one had downloaded"
        raise InputError(f"no vocabulary of GPT-2: {how}: {tool.line(error)}") from error


def decoded(tokens: list[int], vocab: int) -> str:
    """The text of tokens, less those that stand for none."""
    if gpt2 := words(vocab):
        return gpt2.decode([t for t in tokens if t < 50256])
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def write(run, prompt: str, n: int, samples: int, temperature: float, top_k: int):
    """Texts, the prompt and n tokens that the model puts behind it, and the seconds they took. One
    buffer, so compiled once, before the clock starts; every token computes it all again, which at
    these sizes is less than a cache would take to move.
    """
    words(run.c.vocab)
    c, ids = run.c, [run.c.bos, *data_fineweb.encode(os.fsencode(prompt), run.c.vocab)]
    room, stop = -(-(len(ids) + n) // 128) * 128, len(ids) + n
    if stop > (most := c.val_long * 16):
        had = f"--prompt has {len(ids) - 1} tokens and --tokens={n}"
        raise InputError(f"{had}: {most - 1} fit together, 16 windows")
    logits = logits_of(run)
    tokens, rng = np.zeros((samples, room), np.int32), np.random.default_rng(c.seed)
    tokens[:, : len(ids)] = ids
    jax.block_until_ready(logits(run.params, tokens, 0))
    began = time.perf_counter()
    for i in range(len(ids), stop):
        z = np.array(logits(run.params, tokens, i - 1), np.float32) / max(temperature, 1e-6)
        others = np.argsort(-z, 1, kind="stable")[:, top_k:]  # of equal ones the first, as top 1
        np.put_along_axis(z, others, -np.inf, 1)
        tokens[:, i] = np.argmax(z + (temperature > 0) * rng.gumbel(size=z.shape), 1)
    spent = time.perf_counter() - began
    return [decoded(row, c.vocab) for row in tokens[:, :stop].tolist()], spent


def sample(mine: dict, keys: dict):
    run = saved(keys)
    run.c = train_gpt.Config(**vars(run.c) | {"seed": mine.pop("seed")})
    texts, spent = write(run, *mine.values())
    count = mine["tokens"] * mine["samples"]
    if jax.process_index() == 0:
        print(*texts, sep="\n" + "-" * 100 + "\n", flush=True)
        speed = f"{count / spent:.0f} tokens/s without compiling"
        print(f"{count} tokens in {spent:.2f} s, {speed}", file=sys.stderr)


def main(argv: list[str]):
    own = {"prompt": "\n", "tokens": 256, "samples": 1, "temperature": 0.8, "top_k": 50}
    mine, keys = split(argv, own | {"seed": 0, "end": False})
    end = mine.pop("end")
    try:
        sample(mine, keys)
    except (Exception, KeyboardInterrupt) as error:
        if not end:
            raise
        print(f"warning: no sample: {tool.line(error)}", file=sys.stderr)


if __name__ == "__main__":
    tool.run(main)
