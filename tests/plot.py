"""Losses of runs side by side: ./launch plot [RUN ...] [--out=runs/plot.svg], with no RUN of all
that are under runs/. The target is drawn where the runs have the same.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import curves
import tool
import train_gpt
from sharding import InputError


def read(run: str) -> dict:
    """The curves of a run, none if it has no step behind it. Raises InputError."""
    path = Path("runs", run, "metrics.csv")
    if not path.exists():
        raise InputError(f"{run}: no such run; there are: {', '.join(tool.runs()) or 'none yet'}")
    try:
        return curves.read(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def main(argv: list[str]):
    keys = tool.keys_of([word for word in argv if word.startswith("--")])
    for name in keys:
        train_gpt.choose("key", name, ["out"])
    out = tool.file_of(keys, "out") or "runs/plot.svg"
    named = list(dict.fromkeys(word for word in argv if not word.startswith("--")))
    runs = {run: read(run) for run in named or tool.runs("metrics.csv")}
    if bare := [run for run in named if not runs[run]]:
        raise InputError(f"{bare[0]}: no step has a loss yet")
    runs = {run: found for run, found in runs.items() if found}
    if not runs:
        raise InputError("no run under runs/ has a loss yet")
    targets = {train_gpt.configured(Path("runs", run))[0].get("target") for run in runs}
    target = targets.pop() if len(targets) == 1 else None
    Path(out).write_text(curves.picture([*runs.values()], target, [*runs]))
    print(f"plot: {out}: {', '.join(runs)}")


if __name__ == "__main__":
    tool.run(main)
