"""What `posttrain doctor` says of the machine it runs on: its devices, the TPU compiler, the sandbox."""

from collections.abc import Iterator

import jax

from ..data.sandbox import probes
from ..data.sandbox.level import Level, machine
from ..data.sandbox.run import Sandbox
from . import compiled
from .tpu.preflight import Check


def checks() -> Iterator[Check]:
    """Each as soon as it is known; the sandbox, which is attacked in every way that its tests know, takes seconds."""
    devices = jax.devices()
    yield Check("devices", True, f"{len(devices)} x {devices[0].device_kind} (jax {jax.__version__})")
    yield _compiler()
    yield from _sandbox()


def _compiler() -> Check:
    try:
        compiled.check_compiler()
    except ImportError as error:
        return Check("TPU compiler", None, str(error))
    return Check("TPU compiler", True, "there, for `posttrain plan`")


def _sandbox() -> Iterator[Check]:
    found = machine()
    level = found.level
    if level < Level.PLAIN:
        yield Check("sandbox", False, f"model-written code cannot be run here: {found.reason}")
        return
    name = level.name.lower()
    enough = level is Level.BUBBLEWRAP
    yield Check("sandbox", True if enough else None, name if enough else f"{name}, no higher, as {found.reason}")
    findings = probes.check(Sandbox(required=Level.PLAIN, level=level))
    through = [one.name for one in probes.got_through(findings, level)]
    held = f"{len(findings) - len(through)} of {len(findings)} withstood"
    rest = f"{held}: {', '.join(through)} got through" if through else f"{held}; `posttrain sandbox` lists them"
    yield Check("attacks on it", not through, rest)
