"""A launch in the foreground: check, build, drive, say how it ended. Its exit codes are those of the command line."""

import signal
import sys

from ...train.stop import RUN_AGAIN
from .. import lock
from . import bundle, cloud, commands, driver, preflight, record
from .driver import World
from .record import Record
from .spec import Spec

FAILED, STOPPED = 1, 130


def launch(spec: Spec, fetch: str, world: World, *, dirty: bool) -> None:
    """Launch, or go on with a launch of the same settings, until it has ended or is left.

    Raises:
        ValueError: for what would go wrong, before anything is created.
        SystemExit: with 1 for a run that failed, 75 for one that was left running, 130 for one that was stopped.
    """
    preflight.require(iter([preflight.name_in_use(spec)]), world.say)
    old = record.find(spec.name)
    if old is None or old.over:
        old = prepare(spec, fetch, dirty=dirty, world=world)
    attach(old, world)


def prepare(spec: Spec, fetch: str, *, dirty: bool, world: World) -> Record:
    """Check everything, build what the hosts get, and write the record of a launch that has not begun."""
    commit = bundle.commit(dirty=dirty)
    preflight.require(preflight.checks(spec, world.run), world.say)
    one = record.new(spec, commit=commit, fetch=fetch)
    record.save(one)
    wheels = one.folder / "wheel"
    bundle.wheel(commit, wheels)
    bundle.write(spec, one.folder, wheels=wheels)
    if spec.out.startswith("gs://"):
        settings = one.folder / "settings.json"
        settings.write_text(bundle.settings(spec))
        problem = world.run(commands.remember(spec, str(settings))).problem
        if problem is not None:
            record.forget(one)
            raise ValueError(f"{spec.out} cannot be written: {problem}")
    world.say(f"{spec.name}: commit {commit}, record in {one.folder}")
    return one


def attach(one: Record, world: World) -> None:
    """Drive a launch, and leave with the exit code of how it ended."""
    name = one.spec.name
    remedy = f"see what it does with `posttrain status {name}`, or end it there with Ctrl-C"
    with lock.held(one.folder, remedy=remedy), signals(world):
        one = driver.drive(driver.taken_up(one), world)
    finish(one, world)


class signals:
    """Ctrl-C, SIGTERM and SIGHUP become wishes while the block runs."""

    def __init__(self, world: World) -> None:
        self.handlers = {
            signal.SIGINT: world.wish.interrupt,
            signal.SIGTERM: world.wish.leave,
            signal.SIGHUP: world.wish.leave,
        }

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, handler) for number, handler in self.handlers.items()}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def finish(one: Record, world: World) -> None:
    """Say how it ended, what is left and what to do; exit unless it is done."""
    name, state = one.spec.name, one.state
    if state.exists:
        world.say(f"{name}: {state.message or 'left'}. What is there: {one.spec.tpu} in {one.zone}, which costs money")
        world.say(
            f"  posttrain attach {name}   goes on with it\n  posttrain stop {name}     saves, ends and deletes it"
        )
        sys.exit(FAILED if state.outcome == "failed" else RUN_AGAIN)
    if state.outcome == "done":
        world.say(
            f"{name}: done; nothing is left of it in the cloud. {state.message or f'report: {one.fetch}/report.html'}"
        )
        return
    world.say(f"{name}: {state.outcome or 'left'}: {state.message}. Nothing is left of it in the cloud")
    sys.exit(FAILED if state.outcome == "failed" else STOPPED if state.outcome == "stopped" else RUN_AGAIN)


def stop(one: Record, world: World) -> None:
    """Save and end the program, fetch its report, delete everything."""
    name = one.spec.name
    remedy = "press Ctrl-C there first, which leaves the launch, and stop it then"
    with lock.held(one.folder, remedy=remedy), signals(world):
        one = driver.drive(driver.told_to_end(one), world)
    if one.state.exists:
        finish(one, world)
    world.say(f"{name}: {one.state.outcome}; nothing is left of it in the cloud. {one.state.message}")


def default_project() -> str:
    """The project that gcloud is set to.

    Raises:
        ValueError: if it is set to none.
    """
    said = cloud.run(commands.default_project())
    if said.code != 0 or not said.stdout.strip():
        raise ValueError(
            "--project is missing, and gcloud is set to none: give it, or run `gcloud config set project ID`"
        )
    return said.stdout.strip()
