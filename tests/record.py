"""Trains N seeds and writes what a submission needs: python tests/record.py --name=NAME [--runs=8]
[--target=3.28] [--key=value of Config ...], or ./launch record with the same. Each seed, from
--seed=0 on, is a process of train_gpt.py and a run, record-NAME-SEED: the same command goes on
after a break. A run that fails ends all, with its status: no seed is left out. At the end
records/DATE_NAME/, or that of an earlier day, gets the runs' logs, curves.svg, and README.md with
the one-sided t-test of the claim that the mean of the final validation losses is below the target.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import suppress
from math import atan2, exp, lgamma, pi, sqrt
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import curves
import tool
import train_gpt
from sharding import InputError

Run = namedtuple("Run", "seed folder loss seconds log source setup curve")
RANKS = ("RANK", "SLURM_PROCID", "TPU_WORKER_ID")  # who of several processes this is


def p_value(losses: list[float], target: float) -> float:
    """Of the t-test that the mean is below the target: P(Student's t < ours), if losses differ."""
    n, t = len(losses), (np.mean(losses) - target) / np.std(losses, ddof=1) * sqrt(len(losses))
    x, weights = np.polynomial.legendre.leggauss(200)  # t = -sqrt(n - 1) / tan(angle) has density
    angle = atan2(sqrt(n - 1), -t)  # sin(angle)^(n - 2): no tails, nothing subtracted
    area = angle / 2 * weights @ np.sin(angle / 2 * (x + 1)) ** (n - 2)
    return float(area * exp(lgamma(n / 2) - lgamma((n - 1) / 2)) / sqrt(pi))


def verdict(losses: list[float], target: float) -> str:
    claim = f"The claim that the mean is below {target}"
    if len(set(losses)) < 2:
        return f"{claim} is not shown: there is no p-value without two different losses."
    p = p_value(losses, target)
    return f"{claim} {'holds' if p < 0.01 else 'does not hold'} at the level of 0.01: p = {p:.2g}."


def read(seed: int, folder: Path) -> Run:  # a finished one, as its files tell it
    log, csv = ((folder / name).read_text() for name in ("log.txt", "metrics.csv"))
    source, head, steps = log.split("=" * 100 + "\n", 2)
    setup, config = head.split("\nconfig ")
    c = json.loads(config)
    final = rf"^step:{c['steps']}/.* val_loss:(\S+) train_time:(\d+)ms"
    loss, ms = map(float, re.search(final, steps, re.MULTILINE).groups())
    return Run(seed, folder, loss, ms / 1000, log, source, setup, curves.read(csv))


def readme(name: str, argv: list[str], runs: list[Run], target: float) -> str:
    losses, seconds = [r.loss for r in runs], [r.seconds for r in runs]
    rows = [f"| {r.seed} | {r.loss:.4f} | {r.seconds:.3f} | seed{r.seed}.txt |\n" for r in runs]
    spread = f", standard deviation {np.std(losses, ddof=1):.4f}" if len(runs) > 1 else ""
    cpu = subprocess.getoutput("grep -sm1 '^model name' /proc/cpuinfo | cut -d: -f2-").strip()
    return f"""# {name}

{verdict(losses, target)}

| seed | final validation loss | train time, s | log |
|-|-|-|-|
{"".join(rows)}
Loss: mean {np.mean(losses):.4f}{spread}. Train time, without compiling and validating:
mean {np.mean(seconds):.3f} s. The logs hold the sources, the config and every step. The p-value is
`scipy.stats.ttest_1samp({losses}, {target}, alternative="less").pvalue`.

![losses over steps](curves.svg) Early train losses are weighted sums over several next tokens.

- Command: `./launch record {shlex.join(argv)}`
- Devices and versions: {"; ".join(dict.fromkeys(run.setup for run in runs))}
- Host: {cpu or "CPU"}, {os.cpu_count()} cores
"""


def check(run: Path):
    """Raises InputError if the rest of a begun run would be trained by other sources."""
    _, log = train_gpt.configured(run)
    done = re.search(r"^step:(\d+)/\1 val_loss", log, re.M)
    if log and not (done or log.startswith(train_gpt.CODE)):
        raise InputError(f"{run} was begun by other sources: choose another --name")


def write(name: str, argv: list[str], runs: list[Run], target: float):
    if odd := [run.folder for run in runs if run.source != runs[0].source]:
        raise InputError(f"{odd[0]} and {runs[0].folder} differ in sources: choose another --name")
    there = sorted(Path("records").glob(f"????-??-??_{name}"))
    folder = [Path("records", f"{time.strftime('%Y-%m-%d')}_{name}"), *there][-1]
    folder.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("seed*.txt"):  # of an earlier record
        log.unlink(missing_ok=True)
    for run in runs:
        (folder / f"seed{run.seed}.txt").write_text(run.log)
    (folder / "curves.svg").write_text(curves.picture([run.curve for run in runs], target))
    (folder / "README.md").write_text(text := readme(name, argv, runs, target))
    print(f"record: {folder}: {text.splitlines()[2]}")


def train(args: list[str]) -> int:
    """Exit status of a trainer. SIGTERM is passed on to it; a terminal sends it SIGINT itself."""
    heard = []
    with subprocess.Popen([sys.executable, train_gpt.__file__, "train", *args]) as child:
        hear = lambda n, _: heard.append(n) or n == signal.SIGINT or child.send_signal(n)
        before = {n: signal.signal(n, hear) for n in (signal.SIGTERM, signal.SIGINT)}
        status = child.wait() or (75 if heard else 0)  # 0: it had just ended by itself
        for pair in before.items():
            signal.signal(*pair)
    return status if status >= 0 else 128 - status


def main(argv: list[str]):
    keys = tool.keys_of(argv)
    name, n = keys.pop("name", ""), keys.pop("runs", "8")
    if not re.fullmatch(r"\w[\w.-]* [1-9]\d*", f"{name} {n}") or {"run", "resume"} & {*keys}:
        raise InputError(f"--name={name} --runs={n}: a name without /, runs > 0, no --run/--resume")
    c, n = train_gpt.Config(**keys), int(n)
    first = c.seed
    runs = {seed: Path("runs", f"record-{name}-{seed}") for seed in range(first, first + n)}
    for seed, run in runs.items():
        print(f"record: {run}, of seeds {first} to {first + n - 1}", flush=True)
        check(run)
        args = [f"--{key}={value}" for key, value in keys.items() if key != "seed"]
        if status := train([*args, f"--seed={seed}", f"--run={run.name}"]):
            with suppress(BrokenPipeError):  # `| tee` hears Ctrl-C as well, and ends first
                os.write(2, f"record: {run} ended with status {status}\n".encode())
            sys.exit(status)
    if next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0":
        write(name, argv, [read(*run) for run in runs.items()], c.target)  # the runs' may be others


if __name__ == "__main__":
    tool.run(main)
