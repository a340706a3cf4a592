"""A launch in the foreground: check, build, drive, say how it ended. Its exit codes are those of the command line."""

import contextlib
import dataclasses
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent import futures

from ...train.stop import RUN_AGAIN
from .. import lock
from . import bundle, cloud, commands, driver, preflight, record
from . import fan_out as fanned
from . import spec as specs
from .driver import Wish, World
from .fan_out import Lane
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
    one = record.find(spec.name)
    if one is None or one.over:
        commit = bundle.commit(dirty=dirty)
        preflight.require(preflight.checks(spec, world.run), world.say)
        one = prepare(spec, fetch, world, commit=commit)
    attach(one, world)


def prepare(spec: Spec, fetch: str, world: World, *, commit: str) -> Record:
    """Build what the hosts get, and write the record of a launch that has not begun."""
    one = record.new(spec, commit=commit, fetch=fetch)
    record.save(one)
    wheels = one.folder / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    bundle.wheel(commit, wheels)
    bundle.write(spec, one.folder, wheels=wheels)
    if spec.bucket:
        settings = one.folder / "settings.json"
        settings.write_text(bundle.settings(spec))
        problem = world.run(commands.remember(spec, str(settings))).problem
        if problem is not None:
            record.forget(one)
            raise ValueError(f"{spec.out} cannot be written: {problem}")
    world.say(f"{spec.name}: commit {commit}, record in {one.folder}")
    return one


def fan_out(spec: Spec, rounds: Sequence[Sequence[Lane]], fetch: str, world: World, *, dirty: bool) -> None:
    """Launch each round's lanes side by side, each on slices of its own, and at the end what is left as one launch.

    The lanes are launches with names of their own (NAME-ROUND-LANE). To go on, run the same again: lanes that are done
    are skipped, others are taken up.

    Raises:
        ValueError: for what would go wrong, before anything is created.
        SystemExit: as `launch`, if a lane does not end well; the others are left running.
    """
    commit = bundle.commit(dirty=dirty)
    widest = max(map(len, rounds))
    wide = dataclasses.replace(spec, slices=spec.slices * widest)  # the quota of all lanes together
    preflight.require(preflight.checks(wide, world.run), world.say)
    for launches in fanned.launches(spec.name, rounds)[:-1]:
        parts = [dataclasses.replace(spec, name=name, only=lane) for name, lane in launches]
        ended = _side_by_side([_begun(part, fetch, world, commit=commit) for part in parts], world)
        for one in (one for one in ended if one.state.outcome != "done"):
            finish(one, world)
    attach(_begun(spec, fetch, world, commit=commit), world)


def _begun(spec: Spec, fetch: str, world: World, *, commit: str) -> Record:
    """The launch of this name, as far as it has come."""
    specs.check(spec)
    preflight.require(iter([preflight.name_in_use(spec)]), world.say)
    one = record.find(spec.name)
    return prepare(spec, fetch, world, commit=commit) if one is None or _is_stale(one) else one


def _is_stale(one: Record) -> bool:
    """Whether it has ended, and not well: it begins anew."""
    return one.over and one.state.outcome != "done"


def _side_by_side(launches: Sequence[Record], world: World) -> list[Record]:
    """Drive launches together; the user's wishes are for all of them."""
    worlds = [_of_lane(one, world) for one in launches]
    remedy = "it is followed by another process"
    with contextlib.ExitStack() as stack, signals(*worlds):
        for one in launches:
            stack.enter_context(lock.held(one.folder, remedy=remedy))
        pool = stack.enter_context(futures.ThreadPoolExecutor(len(launches)))
        begun = [
            pool.submit(driver.drive, driver.taken_up(one), own) for one, own in zip(launches, worlds, strict=True)
        ]
        return [one.result() for one in begun]


def _of_lane(one: Record, world: World) -> World:
    """A world for a lane: its log's lines begin with its name, and it has a wish of its own."""

    def log(text: str) -> None:
        world.log("".join(f"{one.spec.name}: {line}\n" for line in text.splitlines()))

    return dataclasses.replace(world, wish=Wish(), log=log)


def attach(one: Record, world: World) -> None:
    """Drive a launch, and leave with the exit code of how it ended."""
    name = one.spec.name
    remedy = f"see what it does with `posttrain status {name}`, or end it there with Ctrl-C"
    with lock.held(one.folder, remedy=remedy), signals(world):
        one = driver.drive(driver.taken_up(one), world)
    finish(one, world)


class signals:
    """Ctrl-C, SIGTERM and SIGHUP become wishes in these worlds while the block runs."""

    def __init__(self, *worlds: World) -> None:
        def interrupt(*_: object) -> None:
            for world in worlds:
                world.wish.interrupt()

        def leave(*_: object) -> None:
            for world in worlds:
                world.wish.leave()

        self.handlers = {signal.SIGINT: interrupt, signal.SIGTERM: leave, signal.SIGHUP: leave}

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
