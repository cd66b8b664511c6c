"""Kills a run with SIGKILL again and again, at random moments, in saves and in validations, and
compares what it ends with to a run that nothing stopped: python tests/kill.py [KILLS=20 [SEED=0]].
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import orbax.checkpoint as ocp

import tool
from commands import PYTHON, TINY, run

LONG = [*TINY, "--steps=150", "--val_every=7", "--save_every=5", "--run=a"]
MOMENTS = ("at a random moment", "in a save", "before a validation's line")


def values(folder) -> list:
    """(step, name, value) of every line of metrics.csv, in order of them."""
    lines = (Path(folder) / "runs/a/metrics.csv").read_text().splitlines()[1:]
    return sorted(tuple(line.split(",")[i] for i in (0, 2, 3)) for line in lines)


def last_state(folder) -> dict:
    """All that the newest checkpoint holds: name -> (dtype, shape, bytes)."""
    with ocp.CheckpointManager((Path(folder) / "runs/a/checkpoints").absolute()) as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state)}
    held = {name: np.asarray(x) for name, x in leaves.items()}
    return {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in held.items()}


def same(a, b) -> bool:
    """Whether two runs end with the same metrics and parameters, to the last bit, and neither of
    them with what is left of a save that did not end, which takes room."""
    left = [path for folder in (a, b) for path in Path(folder).glob("runs/a/checkpoints/*tmp*")]
    return values(a) == values(b) and last_state(a) == last_state(b) and not left


def killed_once(folder, args, moment: str, random) -> int | None:
    """Starts the run and kills it at such a moment. -> its exit status if it ended before that."""
    there, count = Path(folder) / "runs/a", int(random.integers(1, 6))

    def saving():  # by inode: what a kill left in the middle of a save is still there
        folder = there / "checkpoints"
        found = os.scandir(folder) if folder.exists() else ()
        return {entry.inode() for entry in found if "tmp" in entry.name}

    old, log = saving(), there / "log.txt"
    began, wait, seen, said = None, random.uniform(0, 4), set(), Path(folder) / "said"
    command = [*PYTHON, *args]
    with said.open("w") as out, subprocess.Popen(command, cwd=folder, stdout=out, stderr=out) as p:
        while p.poll() is None:
            if moment == MOMENTS[1]:  # of the count-th save after this start
                seen |= saving() - old
            elif moment == MOMENTS[2]:
                steps = re.findall(
                    r"step:(\d+)/\d+ train_loss", log.read_text() if log.exists() else ""
                )
                seen |= {step for step in steps[-1:] if int(step) % 7 == 0}
            elif began is None and "compiled " in said.read_text():
                began = time.perf_counter()
            elif began and time.perf_counter() - began > wait:
                break
            if len(seen) >= count:
                break
            time.sleep(0.002)
        else:
            return p.returncode
        p.kill()


def main(kills: int = 20, seed: int = 0):
    random, done, status = np.random.default_rng(seed), [], None
    with tempfile.TemporaryDirectory() as folder:
        want, got = Path(folder) / "want", Path(folder) / "got"
        for path in (want, got):
            path.mkdir()
        assert run(want, *LONG).returncode == 0
        while len(done) < kills:
            moment = MOMENTS[len(done) % 3]
            keep = f"--keep={1 + len(done) % 2}"  # with every moment, in turns
            status = killed_once(got, [*LONG, keep], moment, random)
            if status is not None:  # it ended: once more from the start, and so on
                assert status == 0, f"exit status {status}"
                assert same(want, got), "it ended with other values"
                (got / "runs").rename(Path(folder) / f"done{time.perf_counter()}")
                continue
            names = sorted(path.name for path in (got / "runs/a/checkpoints").glob("*"))
            steps = re.findall(r"step:(\d+)/", (got / "said").read_text()) or ["none"]
            print(f"kill {len(done) + 1} {moment}: last step said {steps[-1]}, saved {names}")
            done.append(moment)
        last = run(got, *LONG)
        assert last.returncode == 0, last.stderr
        assert same(want, got), "it ended with other values"
    print(f"survived {len(done)} of {kills} kills: the same metrics and parameters to the last bit")


if __name__ == "__main__":
    tool.run(lambda argv: main(*map(int, argv)))
