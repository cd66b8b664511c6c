"""The tests run on 8 virtual CPU devices, whatever the machine has."""

import sys
from pathlib import Path

import jax

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "allow")
