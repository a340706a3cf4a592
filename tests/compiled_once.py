"""Hosts that are processes of one machine compile each program once, for all of them and for their next lives.

On CPUs the name of a program in JAX's cache has the process and its devices in it, so that only the first process,
which alone writes, ever finds what it looks for.
"""

from jax._src import cache_key  # no public way to say what a program depends on

ENVIRONMENT = {"JAX_SHARE_BINARY_BETWEEN_HOSTS": "true"}
"""With this the first process hands a program on as soon as it is compiled, while the others wait for it."""


def share() -> None:
    """Name programs the same on all processes. Before anything is compiled."""
    options = cache_key._hash_serialized_compile_options
    cache_key._hash_serialized_compile_options = lambda hashed, of, **_: options(
        hashed, of, strip_device_assignment=True
    )
    cache_key._hash_accelerator_config = lambda hashed, devices: hashed.update(f"{devices.shape}".encode())
