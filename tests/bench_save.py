"""What a save costs the training loop, against a step: python tests/bench_save.py [--key=value ...]

Trains `smoke` for a few steps and saves after every third: how long the call holds the loop up, and
how much longer the step behind it takes, while the save is written in the background."""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import orbax.checkpoint as ocp

import tool
import train_gpt

STEPS, EVERY = 30, 3


def main(argv: list[str]):
    keys = tool.keys_of(argv)
    defaults = {"preset": "smoke", "steps": STEPS, "val_tokens": 8192, "val_every": 10**6}
    c = train_gpt.Config(**defaults | {"save_every": EVERY} | keys)
    holds, save, ends = {}, ocp.CheckpointManager.save, []

    def timed(self, step, **more):
        began = time.perf_counter()
        saved = save(self, step, **more)
        holds[step] = time.perf_counter() - began
        return saved

    def scalar(self, step, ms, name, value, show=True):  # no disk but the checkpoints'
        if name == "train_loss":
            ends.append((step, ms / 1000))

    ocp.CheckpointManager.save = timed
    train_gpt.Journal.scalar = scalar
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = train_gpt.train(c).run_dir
        size = sum(path.stat().st_size for path in run.glob("checkpoints/*/**/*")) / 1e6
        kept = sum(path.name.isdigit() for path in run.glob("checkpoints/*"))
    took = {step: t - before for (_, before), (step, t) in zip(ends, ends[1:])}
    # Of the log's times, which have no saves in them; the step behind one is the save's next one.
    plain = median(t for step, t in took.items() if (step - 1) % c.save_every and step > 3)
    after = median(t for step, t in took.items() if (step - 1) % c.save_every == 0 and step > 3)
    first, *others = holds.values()
    hold, behind = median(others), after - plain
    print(f"{size / kept:.1f} MB a checkpoint, {len(holds)} saves in {c.steps} steps")
    for name, seconds in (
        ("a step", plain),
        ("the first save's call", first),
        ("a later one's, median", hold),
        ("a later one's, longest", max(others)),
        ("the step behind a save, more", behind),
        ("a save in all", hold + behind),
    ):
        print(f"{name:30} {1000 * seconds:8.1f} ms {seconds / plain:6.2f} steps")


if __name__ == "__main__":
    tool.run(main)
