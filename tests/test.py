"""The tests, on the CPU: ./launch test, and whatever pytest takes: ./launch test -k units."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tool
from sharding import InputError


def main(argv: list[str]):
    if missing := [name for name in ("pytest", "xdist") if not find_spec(name)]:
        raise InputError(f"{sys.executable} has no {missing[0]}: pip install pytest-xdist")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.execv(
        sys.executable, [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent), *argv]
    )


if __name__ == "__main__":
    tool.run(main)
