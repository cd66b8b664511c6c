"""The tests, on the CPU: ./launch test, and whatever pytest takes: ./launch test -k units."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    for name in ("pytest", "xdist"):
        if not find_spec(name):
            print(f"{sys.executable} has no {name}: pip install pytest-xdist", file=sys.stderr)
            sys.exit(2)
    os.environ["JAX_PLATFORMS"] = "cpu"
    named = any(Path(word.partition("::")[0]).exists() for word in sys.argv[1:])
    all_ = [] if named else [str(Path(__file__).parent)]
    command = [sys.executable, "-m", "pytest", "-q", *all_, *sys.argv[1:]]
    os.execv(sys.executable, command)
