"""Every test runs on the CPU with eight devices, with shape annotations checked and rank promotion forbidden."""

import importlib
import os
from pathlib import Path

import jax
from jaxtyping import install_import_hook

# What this process and the processes that tests start share. Compiled programs are kept between runs, the small ones of
# eager operations too: the chunked-loss tests take 75 s the first time and 17 s the second, the policy-loss tests 28 s
# and 5 s. Safe, because a program is found by its HLO, the flags and the jaxlib version: any change compiles anew.
SHARED = {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": str(Path(__file__).parent.parent / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
# Programs run for milliseconds and take seconds to compile: without LLVM's optimisations a quarter less time in all.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
for name, value in SHARED.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the first import of these modules: from here on their jaxtyping annotations are checked at every call.
install_import_hook(["posttrain.sharding", "posttrain.model", "posttrain.train"], "beartype.beartype")

# Eight devices on fewer cores: tests that use a mesh of their own have JAX's devices before `make_mesh` is called.
importlib.import_module("posttrain.sharding.mesh").spare_threads()


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: another process runs the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_plan.py")
