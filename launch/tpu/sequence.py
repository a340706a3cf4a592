"""All commands of a launch, in their order, with what each is for: what --dry-run prints, and what the manual shows."""

from typing import NamedTuple

from . import bundle, commands
from .commands import Command
from .spec import Spec


class Part(NamedTuple):
    """Commands for one purpose."""

    purpose: str
    commands: list[Command]


def parts(spec: Spec, *, launch: str, folder: str, fetch: str) -> list[Part]:
    """The whole launch if nothing goes wrong, in its first zone.

    Args:
        spec: what is launched.
        launch: the id on its label.
        folder: where its record and bundle are on this machine.
        fetch: where the report goes.
    """
    zone, stored = spec.zones[0], spec.out.startswith("gs://")
    in_zones = [commands.accelerators(spec, one) for one in spec.zones]
    before = [commands.account(spec), commands.enabled(spec), *in_zones]
    before += [commands.quotas(spec)] if spec.capacity != "reserved" else []
    before += [commands.settings(spec), commands.remember(spec, f"{folder}/settings.json")] if stored else []
    return [
        Part("Before anything is created: account, API, hardware, quota, run folder", before),
        Part("Ask for the slices, and wait until their state is ACTIVE", [
            commands.create(spec, zone, launch),
            commands.describe(spec, zone),
        ]),
        Part("Copy the wheel of this commit to every host, and install it", [
            commands.copy(spec, zone, f"{folder}/bundle/{commands.folder(spec.name)}"),
            commands.on_hosts(spec, zone, "bootstrap", seconds=3600),
        ]),
        Part(f"Start it under systemd on every host: {bundle.run_script(spec).strip()}", [
            commands.on_hosts(spec, zone, "start"),
        ]),
        Part("Follow its log; where the first host is not well, ask all", [
            commands.on_hosts(spec, zone, "look", "0", worker="0/0"),
            commands.nodes(spec, zone),
            commands.on_hosts(spec, zone, "look"),
        ]),
        Part("Fetch the report, and delete what was created", [
            commands.fetch(spec, zone, fetch),
            commands.delete(spec, zone),
        ]),
    ]  # fmt: skip


def text(found: list[Part]) -> str:
    """The commands as a script with comments."""
    return "\n\n".join(f"# {one.purpose}\n" + "\n".join(map(str, one.commands)) for one in found)
