"""`posttrain ls|status|logs|attach|stop|doctor`: what was launched from this machine, and what became of it."""

import re
import sys
from collections.abc import Iterable
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from ..tpu import cloud, commands, driver, preflight, record, session
from ..tpu import spec as specs
from ..tpu.driver import World
from ..tpu.preflight import Check
from ..tpu.record import Record
from ..tpu.spec import Capacity, Spec

LAUNCH = """Run a recipe on a TPU pod: gcloud asks for the slices, every host installs this commit and starts it.

Whatever it needs is checked before anything is created. The program runs detached, under systemd: Ctrl-C leaves it
running. Slices that are preempted are deleted and asked for again, and the run goes on from its newest checkpoint. At
the end the report is fetched and what was created is deleted. What was created is on record: see `posttrain ls`.
`posttrain launch RECIPE --help` lists all options; docs/pods.md begins with an empty project.

  posttrain launch rl --model gs://bucket/model --tpu v6e-16 --zone us-east5-b --spot --out gs://bucket/runs/first
  posttrain launch mopd --base smollm2 --tpu v5litepod-16 --zone us-central1-a --out gs://bucket/runs/mopd --dry-run"""

Name = Positional[Annotated[str, arg(metavar="NAME", help="Of a launch; `posttrain ls` lists them.")]]


def ls() -> None:
    """List what was launched from this machine, and what of it still costs money."""
    rows = [("NAME", "RECIPE", "TPU", "ZONE", "STATE", "COSTS", "PREEMPTED", "OUT")]
    for one in record.every():
        spec, state = one.spec, one.state
        tpu = spec.tpu if spec.slices == 1 else f"{spec.slices} x {spec.tpu}"
        now, costs = state.outcome or state.next, "yes" if state.exists else "no"
        rows.append((spec.name, spec.recipe, tpu, one.zone, now, costs, str(state.preemptions), spec.out))
    print(cloud.for_table(rows) if len(rows) > 1 else f"no launches were made from this machine ({record.home()})")


def status(name: Name, /, *, json: Annotated[bool, arg(help="Only the record, as JSON.")] = False) -> None:
    """Show what the record, the cloud and the hosts say of a launch."""
    one, world = record.load(name), World()
    if json:
        print(driver.as_json(one))
        return
    print(f"{name}: {one.spec.recipe} on {one.spec.slices} x {one.spec.tpu} in {one.zone}, commit {one.commit}")
    print(f"record: {one.state.outcome or one.state.next}, {one.state.preemptions} preemptions. {one.state.message}")
    if not one.state.exists:
        return
    seen = driver.described(one, world)
    if seen is None or seen.problem is not None:
        print(f"cloud: {seen.problem if seen else 'not asked'}")
        return
    print(f"cloud: {seen.resource.state if seen.resource else 'nothing of that name'}")
    if seen.resource is not None and seen.resource.state == "ACTIVE":
        answer = world.run(commands.on_hosts(one.spec, one.zone, "look"))
        rows = [(host.name, host.state, str(host.code)) for host in sorted(cloud.hosts(answer.stdout))]
        print(cloud.for_table([("HOST", "STATE", "CODE"), *rows]))
        if len(rows) < one.spec.hosts:
            print(f"{one.spec.hosts - len(rows)} of {one.spec.hosts} hosts did not answer: {answer.problem}")


def logs(name: Name, /, *, worker: Annotated[str, arg(metavar="SLICE/HOST", help="Which host's.")] = "0/0") -> None:
    """Print the log of a host of a launch; what was seen of the first host's is kept when it is gone."""
    one, world = record.load(name), World()
    if not re.fullmatch(r"\d+/\d+", worker):
        raise ValueError(f"--worker {worker!r}: give the number of the slice and that of its host, such as 0/3")
    if not one.state.exists:
        kept = one.folder / "log"
        print(
            kept.read_text() if kept.is_file() else f"{name} has no log: {one.state.message or 'it did not start'}",
            end="",
        )
        return
    offset = 0
    while True:
        answer = world.run(commands.on_hosts(one.spec, one.zone, "look", str(offset), worker=worker))
        found = cloud.hosts(answer.stdout)
        if answer.problem is not None or not found:
            raise ValueError(f"host {worker} of {name} does not answer: {answer.problem or 'it has not been started'}")
        sys.stdout.write(cloud.log_part(answer.stdout))
        if found[0].size - offset < cloud.PIECE:  # the end, for now
            return
        offset = found[0].size


def attach(name: Name, /) -> None:
    """Go on with a launch that was left: follow its log, and ask again for slices that it loses."""
    session.attach(record.load(name), World())


def stop(name: Name, /) -> None:
    """End a launch: its program saves and ends, its report is fetched, what it created is deleted."""
    session.stop(record.load(name), World())


def doctor(
    name: Positional[Annotated[str, arg(metavar="[NAME]", help="Of a launch.")]] = "",
    /,
    *,
    tpu: Annotated[str, arg(help="Without a name: the hardware to look for, v6e-8 unless given.")] = "",
    zone: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="ZONE", help="And where.")]] = (),
    spot: Annotated[bool, arg(help="And with which quota.")] = False,
    project: str = "",
) -> None:
    """Check this machine or, with a name or any option, what a launch needs; it ends with 1 if something is wrong.

    This machine: devices, the TPU compiler, and what the sandbox withstands (`posttrain sandbox` tells more). A launch:
    account, API, hardware, quota, run folder, hosts.
    """
    if not (name or tpu or zone or spot or project):
        from .. import checkup  # which imports JAX: help does not wait for it

        if not _shown(checkup.checks()):
            sys.exit(1)
        return
    world, one = World(), record.load(name) if name else None
    if one is None:
        capacity: Capacity = "spot" if spot else "on-demand"
        spec = Spec(
            name="doctor",
            recipe="",
            words=(),
            out="/",
            tpu=tpu or "v6e-8",
            zones=tuple(zone),
            project=project or session.default_project(),
            capacity=capacity,
        )
    else:
        spec = one.spec
    specs.check(spec)
    well = _shown(preflight.checks(spec, world.run))
    if not well or (one is not None and not _hosts_are_well(one, world)):
        sys.exit(1)


def _shown(checks: Iterable[Check]) -> bool:
    """Print each check; whether none of them fails."""
    well = True
    for check in checks:
        print(f"  {'?' if check.holds is None else '✓' if check.holds else '✗'} {check.about}: {check.said}")
        well &= check.holds is not False
    return well


def _hosts_are_well(one: Record, world: World) -> bool:
    if not one.state.exists:
        return True
    seen = driver.described(one, world)
    state = seen.resource.state if seen is not None and seen.resource is not None else "not there"
    print(f"  {'✓' if state == 'ACTIVE' else '?'} queued resource: {state}")
    if state != "ACTIVE":
        return True
    answer = world.run(commands.on_hosts(one.spec, one.zone, "look"))
    found = cloud.hosts(answer.stdout)
    well = len(found) == one.spec.hosts
    trouble = "" if well else f"; {answer.problem}"
    print(f"  {'✓' if well else '✗'} hosts: {len(found)} of {one.spec.hosts} answer{trouble}")
    return well


COMMANDS = (ls, status, logs, attach, stop, doctor)
