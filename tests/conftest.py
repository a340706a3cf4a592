"""Every test runs on the CPU with eight devices, with shape annotations checked and rank promotion forbidden."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the first import of these modules: from here on their jaxtyping annotations are checked at every call.
install_import_hook(["posttrain.sharding", "posttrain.model", "posttrain.train"], "beartype.beartype")
