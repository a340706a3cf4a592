"""Performs what the state machine says, and stores the state before each action. Time and output are handed in."""

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import cloud, commands, lifecycle, record
from .cloud import Answer
from .commands import Command
from .errors import Problem, classify
from .lifecycle import Action, Limits, Seen, State
from .record import Record

Say = Callable[[str], None]


@dataclass
class Wish:
    """What the user asked for by signals: '', 'stop' (a first Ctrl-C) or 'leave' (a second, SIGTERM, SIGHUP)."""

    word: str = ""
    times: int = 0

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.times += 1
        self.word = "stop" if self.times == 1 else "leave"

    def leave(self) -> None:
        """SIGTERM or SIGHUP."""
        self.word = "leave"


@dataclass
class World:
    """Everything outside: commands, time, what is shown, and the user's wish."""

    wish: Wish = field(default_factory=Wish)
    say: Say = print
    log: Callable[[str], None] = lambda text: print(text, end="", flush=True)
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random

    def run(self, command: Command) -> Answer:
        """Run a command, cut off if the user asks to stop and it need not finish."""
        before = self.wish.word
        return cloud.run(command, lambda: self.wish.word != before)


def limits(one: Record, **changes: float) -> Limits:
    """How patient the launch is."""
    return Limits(zones=len(one.spec.zones), patience=one.spec.hours * 3600, **changes)  # pyright: ignore[reportArgumentType]


def drive(one: Record, world: World, bounds: Limits | None = None) -> Record:
    """Go on with a launch until it has ended or is left; the record says how."""
    bounds = bounds or limits(one)
    while one.state.next != Action.QUIT:
        record.save(one)
        _wait(one.state.pause, world)
        if world.wish.word:
            one = _asked(one, world)
            if one.state.next == Action.QUIT:
                break
        one = _now(one, _marked(one.state))
        record.save(one)
        seen = perform(one, world)
        if seen is None:  # cut off
            continue
        following = lifecycle.step(one.state, seen, bounds)
        _tell(one, following, world)
        one = _now(one, following)
    record.save(one)
    return one


def _now(one: Record, state: State) -> Record:
    return dataclasses.replace(one, state=state)


def _marked(state: State) -> State:
    """Before a creation is tried, the record says that something may exist."""
    return dataclasses.replace(state, exists=True) if state.next == Action.CREATE else state


def _asked(one: Record, world: World) -> Record:
    """The state after the user's wish; a first Ctrl-C while things are deleted lets that go on."""
    if world.wish.word == "leave":
        return _now(one, lifecycle.left(one.state, "left"))
    after = lifecycle.interrupted(one.state)
    world.wish.word = ""
    if after != one.state and after.next == Action.DELETE:
        world.say("deleting what was created; Ctrl-C once more leaves it (`posttrain stop` deletes it later)")
    return _now(one, after)


def _wait(seconds: float, world: World) -> None:
    """Sleep, a little longer than asked for so that many launchers do not call together, until the user has a wish."""
    until = world.now() + seconds * (1 + 0.1 * world.jitter())
    while not world.wish.word and (remaining := until - world.now()) > 0:
        world.sleep(min(remaining, 1.0))


def _tell(one: Record, after: State, world: World) -> None:
    """One line where something changed."""
    before, where = one.state, f"{one.spec.tpu} in {one.zone}"
    if after.next == Action.QUIT:
        return
    if after.preemptions > before.preemptions:
        world.say(
            f"{one.spec.name}: preempted (the {after.preemptions}. time); deleting it and asking for {where} again"
        )
    elif after.restarts > before.restarts:
        world.say(f"{one.spec.name}: the program saved and ended, or lost a host; starting it again")
    elif after.stockouts > before.stockouts:
        world.say(f"{one.spec.name}: {after.message}")
    elif after.next != before.next:
        world.say(f"{one.spec.name}: {WORDS[after.next].format(where=where, hosts=one.spec.hosts, out=one.spec.out)}")


WORDS = {
    Action.CREATE: "asking for {where}",
    Action.WATCH: "waiting for {where}",
    Action.BOOTSTRAP: "installing on {hosts} hosts",
    Action.START: "starting on {hosts} hosts",
    Action.FOLLOW: "running; Ctrl-C leaves it running, results go to {out}",
    Action.JUDGE: "asking all hosts how they are",
    Action.HALT: "asking the program to save and end",
    Action.FETCH: "fetching the report",
    Action.DELETE: "deleting what was created",
}


def perform(one: Record, world: World) -> Seen | None:
    """Do the next action; None if it was cut off by the user."""
    return PERFORM[one.state.next](one, world)


def _create(one: Record, world: World) -> Seen | None:
    return _outcome(world.run(commands.create(one.spec, one.zone, one.launch)), world)


def _outcome(answer: Answer, world: World) -> Seen | None:
    return None if answer.code is None else Seen(problem=answer.problem, now=world.now())


def described(one: Record, world: World) -> Seen | None:
    """The queued resource, as the API has it."""
    answer = world.run(commands.describe(one.spec, one.zone))
    problem = answer.problem
    if answer.code is None:
        return None
    if problem is not None:
        there = problem.kind == "absent"
        return Seen(problem=None if there else problem, described=there, now=world.now())
    try:
        return Seen(described=True, resource=cloud.resource(answer.stdout, one.launch), now=world.now())
    except ValueError:
        return Seen(problem=classify(f"UNAVAILABLE: not JSON: {answer.stdout[:200]!r}"), now=world.now())


def _bootstrap(one: Record, world: World) -> Seen | None:
    """Copy the bundle to every host and install it; done before, it takes a moment."""
    bundle = one.folder / "bundle" / commands.folder(one.spec.name)
    copied = _outcome(world.run(commands.copy(one.spec, one.zone, str(bundle))), world)
    if copied is None or copied.problem is not None:
        return copied
    return _on_all(one, world, "bootstrap", "posttrain-ready", seconds=3600)


def _on_all(one: Record, world: World, verb: str, mark: str = "", *, seconds: float = 900) -> Seen | None:
    """A verb of host.sh on all hosts; all of them have to answer with the mark, where there is one."""
    answer = world.run(commands.on_hosts(one.spec, one.zone, verb, seconds=seconds))
    seen = _outcome(answer, world)
    ready = answer.stdout.count(mark) if mark else one.spec.hosts
    if seen is not None and seen.problem is None and ready < one.spec.hosts:
        said = f"{verb}: {ready} of {one.spec.hosts} hosts answered, the others: Connection refused"
        return seen._replace(problem=classify(said))
    return seen


def _follow(one: Record, world: World) -> Seen | None:
    """The resource, and the first host's state with what is new in its log."""
    seen = described(one, world)
    if seen is None or seen.resource is None or seen.resource.state != "ACTIVE":
        return seen
    look = commands.on_hosts(one.spec, one.zone, "look", str(one.state.offset), worker="0/0")
    answer = world.run(look)
    if answer.code is None:
        return None
    found = cloud.hosts(answer.stdout)
    text = cloud.log_part(answer.stdout)
    world.log(text)
    with (one.folder / "log").open("a") as file:
        file.write(text)
    return seen._replace(problem=answer.problem, hosts=found)


def _judge(one: Record, world: World) -> Seen | None:
    """The resource, its slices, and every host that answers."""
    seen = described(one, world)
    if seen is None or seen.resource is None or seen.resource.state != "ACTIVE":
        return seen
    listed = world.run(commands.nodes(one.spec, one.zone))
    answer = world.run(commands.on_hosts(one.spec, one.zone, "look"))
    if listed.code is None or answer.code is None:
        return None
    states, expected = (), one.spec.hosts
    if listed.code == 0:
        with contextlib.suppress(ValueError):  # not JSON: what the hosts say has to do
            states, expected = cloud.node_states(listed.stdout, one.spec)
    if cloud.ended_badly(answer.stdout):
        world.log(answer.stdout)
        with (one.folder / "log").open("a") as file:
            file.write(answer.stdout)
    return seen._replace(nodes=states, hosts=cloud.hosts(answer.stdout), expected=expected)


def _delete(one: Record, world: World) -> Seen | None:
    """Delete the resource if it is there and ours, then look whether it is gone."""
    seen = described(one, world)
    if seen is None or seen.resource is None or not seen.resource.ours:
        return seen
    problem: Problem | None = None
    if seen.resource.state != "DELETING":
        answer = world.run(commands.delete(one.spec, one.zone))
        problem = answer.problem
    after = described(one, world)
    return None if after is None else after._replace(problem=after.problem or problem)


def _fetch(one: Record, world: World) -> Seen | None:
    if one.spec.only:  # a part of a recipe has no report
        return Seen(now=world.now())
    Path(one.fetch).mkdir(parents=True, exist_ok=True)
    return _outcome(world.run(commands.fetch(one.spec, one.zone, one.fetch)), world)


PERFORM: dict[Action, Callable[[Record, World], Seen | None]] = {
    Action.CREATE: _create,
    Action.WATCH: described,
    Action.BOOTSTRAP: _bootstrap,
    Action.START: lambda one, world: _on_all(one, world, "start"),
    Action.FOLLOW: _follow,
    Action.JUDGE: _judge,
    Action.HALT: lambda one, world: _on_all(one, world, "stop"),
    Action.FETCH: _fetch,
    Action.DELETE: _delete,
}


def as_json(one: Record) -> str:
    """What a script may want to know of it."""
    return json.dumps({"name": one.spec.name, "zone": one.zone, **dataclasses.asdict(one.state)}, indent=2)


def taken_up(one: Record) -> Record:
    """A launch that another process has left."""
    return _now(one, lifecycle.resumed(one.state))


def told_to_end(one: Record) -> Record:
    """A launch that the user wants ended."""
    return _now(one, lifecycle.ended(one.state))
