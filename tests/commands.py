"""Runs a command line of the project in a folder, as a user would; shared by tests."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = "--preset=smoke --width=32 --heads=2 --layers=pvs,k,bl --bigram_rows=64".split()
TINY += ["--val_tokens=8192", "--val_row_tokens=1024"]
ONE_LAYER = [*TINY, "--layers=pvl"]
# The sample behind a training would take as long as such a training does.
CODE = f"""import os, runpy, sys
sys.path.insert(0, "{ROOT}")
start = os.execv
os.execv = lambda path, argv: os._exit(0) if "--end" in argv else start(path, argv)
runpy.run_path("{ROOT}/train_gpt.py", run_name="__main__")"""
PYTHON = [sys.executable, "-c", CODE]


def run(folder, *args, command=PYTHON):
    return subprocess.run(
        [*command, *args], cwd=folder, capture_output=True, text=True, timeout=600
    )


def run_all(folder, *args):
    """With the sample at the end."""
    return run(folder, *args, command=[sys.executable, ROOT / "train_gpt.py"])
