"""Runs a command line of the project in a folder, as a user would; shared by tests."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = "--preset=smoke --width=32 --heads=2 --bigram_rows=64 --val_tokens=8192".split()
TINY += ["--val_row_tokens=1024"]


def run(folder, *args):
    command = [sys.executable, ROOT / "train_gpt.py", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
