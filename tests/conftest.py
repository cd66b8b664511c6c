"""The tests run on 8 virtual CPU devices, whatever the machine has."""

import os
import subprocess
import sys
from pathlib import Path

# Programs that one test compiled, many others run; JAX would keep those above a second alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of the tests' time is compiling, with these flags some half of it, as LLVM has less to do;
# what splits a program over devices is the same.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]


def known(flags: list[str]) -> list[str]:
    """Those that this version of XLA knows: one that it does not know would end Python."""
    asked = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=asked, capture_output=True, text=True)
    if not done.returncode:
        return flags
    rest = [flag for flag in flags if flag not in done.stderr]  # it names them
    return known(rest) if len(rest) < len(flags) else []


if "XLA_FLAGS" not in os.environ:  # asked once, as the workers have the variable
    os.environ["XLA_FLAGS"] = " ".join(known(FLAGS))
# Tests see a pipe as users do: in one, what is printed without a flush can be lost.
os.environ.pop("PYTHONUNBUFFERED", None)

import jax  # noqa: E402, reads them

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "allow")

SLOW = ("test_meshes", "test_parity", "test_processes", "test_train")


def pytest_configure(config):
    config.option.loadscopereorder = False  # workers take the files in this order:


def pytest_collection_modifyitems(items):
    """Those that take minutes first, so that no worker has one of them left at the end."""
    items.sort(key=lambda item: item.path.stem not in SLOW)
