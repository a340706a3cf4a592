"""The life of a launch as a pure state machine: `step(state, seen) -> state`, where `state.next` is what to do next.

    create -> watch -> bootstrap -> start -> follow -> judge -> fetch -> delete -> quit
                 ^         |          |        |         |
                 |         +----------+--------+---------+--> lost: delete -> create     (preempted, stocked out)
                 +-- a host does not answer, or the program asks to be started again

Nothing here runs a command or reads a clock: the driver performs `state.next` after `state.pause` seconds and hands in
what it saw. A state is plain data, so that it can be stored before each action, and taken up by another process.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ...train.stop import RUN_AGAIN
from .errors import Act, Problem, classify


class Action(StrEnum):
    """What to do next."""

    CREATE = "create"
    WATCH = "watch"
    BOOTSTRAP = "bootstrap"
    START = "start"
    FOLLOW = "follow"
    JUDGE = "judge"
    HALT = "halt"
    FETCH = "fetch"
    DELETE = "delete"
    QUIT = "quit"


class Resource(NamedTuple):
    """A queued resource as the API describes it. `ours`: it carries this launch's label."""

    state: str
    initiator: str = ""
    error: str = ""
    ours: bool = True


class Host(NamedTuple):
    """What a host says of the program: running, ended or absent; its exit code; the bytes of its log."""

    name: str
    state: str
    code: int = 0
    size: int = 0


class Seen(NamedTuple):
    """What came of an action.

    `described`: the API was asked for the queued resource and answered; `resource` is then None if there is none.
    `nodes` are states of the slices, where they were asked for; `hosts` are those that answered, of `expected` in all.
    """

    problem: Problem | None = None
    described: bool = False
    resource: Resource | None = None
    nodes: tuple[str, ...] = ()
    hosts: tuple[Host, ...] = ()
    expected: int = 1
    now: float = 0.0


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a launch is.

    `zone` is an index; `moving`: the next creation is in the next zone. `exists`: something may be there that costs
    money. `then` follows a deletion; for a launch that was left, it is where to go on. `outcome` is empty until it is
    decided: done, failed, stopped. `offset` is how much of the log was seen.
    """

    next: Action = Action.CREATE
    pause: float = 0.0
    zone: int = 0
    moving: bool = False
    exists: bool = False
    then: Action = Action.CREATE
    outcome: str = ""
    message: str = ""
    tries: int = 0
    stockouts: int = 0
    preemptions: int = 0
    restarts: int = 0
    crashes: int = 0
    waiting_since: float = 0.0
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How patient a launch is: seconds between looks, and how often what may be tried again."""

    zones: int = 1
    patience: float = 24 * 3600.0
    poll: float = 15.0
    queue_poll: float = 30.0
    stockout_pause: float = 60.0
    longest_pause: float = 900.0
    tries: int = 20
    crashes: int = 3
    restarts: int = 20
    preemptions: int = 1000
    grace: float = 60.0


LOST = ("SUSPENDING", "SUSPENDED", "DELETING")
KILLED = (137, 143)
ABORTED = 134  # JAX ends a process that has lost another one
RUNNING = (Action.FOLLOW, Action.JUDGE, Action.HALT, Action.FETCH)


def step(state: State, seen: Seen, limits: Limits) -> State:
    """The state after an action, from what was seen of it. Total: there is an answer for everything."""
    if seen.resource is not None and not seen.resource.ours:
        message = "a resource of this name is not of this launch, and is left as it is: give another --name"
        return _to(state, Action.QUIT, outcome="failed", message=message, exists=False)
    return HANDLERS[state.next](state, seen, limits)


def interrupted(state: State) -> State:
    """After Ctrl-C: a program that runs is left alone; what was made for one that does not is deleted."""
    if state.next in RUNNING:
        return left(state)
    if state.outcome:  # already on its way out
        return state
    return _end(state, "stopped", "stopped before the program was started")


def ended(state: State) -> State:
    """After `posttrain stop`: the program saves and ends, the report is fetched, everything is deleted."""
    if state.outcome:
        return resumed(state)
    if state.next in RUNNING or (state.next == Action.QUIT and state.then in RUNNING):
        return _to(state, Action.HALT, outcome="stopped", message="stopped")
    return _end(state, "stopped", "stopped before the program was started")


def left(state: State, message: str = "") -> State:
    """Everything stays as it is; `resumed` goes on from there."""
    return _to(state, Action.QUIT, then=state.next, message=message)


def resumed(state: State) -> State:
    """The state to go on from, by a process that finds this one stored."""
    if state.next != Action.QUIT:
        return dataclasses.replace(state, pause=0.0)
    if state.outcome:
        return _to(state, Action.DELETE, then=Action.QUIT) if state.exists else state
    return _to(state, state.then, then=Action.CREATE, message="")


def _to(state: State, action: Action, *, pause: float = 0.0, tries: int = 0, **changes: object) -> State:
    return dataclasses.replace(state, **{"next": action, "pause": pause, "tries": tries, **changes})


def _again(state: State, action: Action, pause: float, **changes: object) -> State:
    """The action once more, counted."""
    return _to(state, action, pause=pause, tries=state.tries + 1, **changes)


def _end(state: State, outcome: str, message: str) -> State:
    """Delete what there is, then quit."""
    changes = {"outcome": outcome, "message": message, "then": Action.QUIT}
    return _to(state, Action.DELETE if state.exists else Action.QUIT, **changes)


def _lost(state: State, limits: Limits) -> State:
    """Preempted: delete what is left and create anew."""
    preemptions = state.preemptions + 1
    if preemptions > limits.preemptions:
        return _end(state, "failed", f"lost its slices {preemptions} times")
    changes = {"preemptions": preemptions, "restarts": 0, "crashes": 0, "offset": 0, "waiting_since": 0.0}
    return _to(state, Action.DELETE, then=Action.CREATE, **changes)


def _elsewhere(state: State, limits: Limits, why: Problem) -> State:
    """No capacity: delete what there is, then create in the next zone; after each round of zones wait, ever longer."""
    changed = dataclasses.replace(state, stockouts=state.stockouts + 1, moving=True, message=str(why))
    return _to(changed, Action.DELETE, then=Action.CREATE) if state.exists else _anew(changed, limits)


def _anew(state: State, limits: Limits) -> State:
    """Create, when nothing is there any more."""
    rounds, place = divmod(state.stockouts, limits.zones)
    waits = state.moving and place == 0
    pause = min(limits.longest_pause, limits.stockout_pause * 2 ** (rounds - 1)) if waits else 0.0
    zone = (state.zone + state.moving) % limits.zones
    return _to(state, Action.CREATE, pause=pause, zone=zone, moving=False, exists=False)


def _impatient(state: State, seen: Seen, limits: Limits) -> bool:
    return bool(state.waiting_since) and seen.now - state.waiting_since > limits.patience


def _create(state: State, seen: Seen, limits: Limits) -> State:
    problem, state = seen.problem, dataclasses.replace(state, waiting_since=state.waiting_since or seen.now)
    if problem is None or problem.kind == "exists":  # by an earlier try that was cut off; its label is looked at next
        return _to(state, Action.WATCH, exists=True)
    if problem.act == Act.HERE and state.tries < limits.tries:  # without an answer, it may have been created
        return _again(state, Action.CREATE, limits.queue_poll, exists=True)
    nothing = dataclasses.replace(state, exists=False)
    if problem.act == Act.ELSEWHERE and not _impatient(state, seen, limits):
        return _elsewhere(nothing, limits, problem)
    return _end(nothing, "failed", str(problem))


def _watch(state: State, seen: Seen, limits: Limits) -> State:
    if not seen.described:
        return _retry(state, seen.problem or classify(""), limits)
    if seen.resource is None:  # perhaps not visible yet
        return _again(state, Action.WATCH, limits.poll) if state.tries < 3 else _gone(state)
    now, error = seen.resource.state, classify(seen.resource.error)
    if now == "ACTIVE":
        return _to(state, Action.BOOTSTRAP, tries=state.tries, stockouts=0, waiting_since=0.0, message="")
    if now == "FAILED":
        if error.act == Act.STOP or _impatient(state, seen, limits):
            return _end(state, "failed", str(error))
        return _elsewhere(state, limits, error)
    if now in LOST:
        return _taken(state, seen.resource, limits)
    if _impatient(state, seen, limits):
        hours = limits.patience / 3600
        return _end(state, "failed", f"no capacity within {hours:g} hours (state {now}): give more --hours or --zone")
    return _to(state, Action.WATCH, pause=limits.queue_poll)


def _gone(state: State) -> State:
    message = "its queued resource is not there any more: somebody deleted it"
    return _end(dataclasses.replace(state, exists=False), "failed", message)


def _taken(state: State, resource: Resource, limits: Limits) -> State:
    """Suspended: by the service it is a preemption, by a user it is the end."""
    if resource.initiator == "USER":
        return _end(state, "failed", "somebody suspended or deleted its queued resource")
    return _lost(state, limits)


def _retry(state: State, problem: Problem, limits: Limits) -> State:
    """After a failure on the way to a running program: look at the resource again, it may be gone."""
    if (problem.act == Act.STOP and problem.kind != "unknown") or state.tries >= limits.tries:
        return _end(state, "failed", str(problem))
    return _again(state, Action.WATCH, limits.poll)


def _bootstrap(state: State, seen: Seen, limits: Limits) -> State:
    return _to(state, Action.START) if seen.problem is None else _retry(state, seen.problem, limits)


def _start(state: State, seen: Seen, limits: Limits) -> State:
    if seen.problem is None:
        return _to(state, Action.FOLLOW, pause=limits.poll, offset=0)
    return _retry(state, seen.problem, limits)


def _follow(state: State, seen: Seen, limits: Limits) -> State:
    """The first host was asked; whatever is not well is judged from all hosts."""
    size = max((host.size for host in seen.hosts), default=0)
    changed = dataclasses.replace(state, offset=max(state.offset, size))
    active = seen.described and seen.resource is not None and seen.resource.state == "ACTIVE"
    if active and seen.problem is None and seen.hosts and seen.hosts[0].state == "running":
        return _to(changed, Action.FOLLOW, pause=limits.poll)
    return _to(changed, Action.JUDGE)


def _judge(state: State, seen: Seen, limits: Limits) -> State:
    """All hosts were asked: is the run done, to be started again, lost or broken?"""
    if not seen.described:
        problem = seen.problem or classify("")
        if (problem.act == Act.STOP and problem.kind != "unknown") or state.tries >= limits.tries:
            return left(state, str(problem))  # the run goes on without us
        return _again(state, Action.JUDGE, limits.poll)
    if seen.resource is None:
        return _gone(state)
    if seen.resource.state != "ACTIVE":
        return _taken(state, seen.resource, limits)
    if any(node != "READY" for node in seen.nodes):
        return _lost(state, limits)
    if len(seen.hosts) < seen.expected:  # a host that does not answer for long is a dead host
        return _again(state, Action.JUDGE, limits.poll) if state.tries < limits.tries else _lost(state, limits)
    if all(host.state == "running" for host in seen.hosts):
        return _to(state, Action.FOLLOW, pause=limits.poll)
    if any(host.state == "running" for host in seen.hosts) and state.tries < limits.tries:
        return _again(state, Action.JUDGE, limits.poll)  # the others are about to end as well
    return _verdict(state, seen.hosts, limits)


def _verdict(state: State, hosts: Sequence[Host], limits: Limits) -> State:
    """What the exit codes of all hosts mean together."""
    codes = {host.code for host in hosts if host.state == "ended"}
    if codes == {0} and all(host.state == "ended" for host in hosts):
        return _to(state, Action.FETCH, outcome="done", message="")
    broken = [host for host in hosts if host.state == "ended" and host.code not in (0, ABORTED)]
    interrupted = RUN_AGAIN in codes or any(code in codes for code in KILLED)
    if broken and not interrupted:  # where a host was killed, the others fail for want of it
        message = f"the program ended with code {broken[0].code} on {broken[0].name}: its log says why"
        return _end(state, "failed", message)
    crashes = state.crashes + (RUN_AGAIN not in codes)
    if crashes > limits.crashes or state.restarts >= limits.restarts:
        said = ", ".join(f"{host.name} {host.code}" for host in hosts)
        return _end(state, "failed", f"the program was started {state.restarts + 1} times and ended again ({said})")
    return _to(state, Action.WATCH, pause=limits.grace, restarts=state.restarts + 1, crashes=crashes)


def _halt(state: State, seen: Seen, limits: Limits) -> State:
    """The program was asked to save and end; if it cannot be reached, what it last saved counts."""
    if seen.problem is not None and seen.problem.act == Act.HERE and state.tries < 3:
        return _again(state, Action.HALT, limits.poll)
    return _to(state, Action.FETCH)


def _fetch(state: State, seen: Seen, limits: Limits) -> State:
    if seen.problem is not None and seen.problem.act == Act.HERE and state.tries < 3:
        return _again(state, Action.FETCH, limits.poll)
    trouble = f"the report was not fetched: {seen.problem}" if seen.problem is not None else state.message
    return _end(state, state.outcome, trouble)


def _delete(state: State, seen: Seen, limits: Limits) -> State:
    """A deletion counts when the resource is not there any more."""
    if seen.described and seen.resource is None:
        if state.then == Action.QUIT:
            return _to(state, Action.QUIT, exists=False)
        return _anew(state, limits)
    if (seen.problem is not None and seen.problem.act == Act.STOP) or state.tries >= 10 * limits.tries:
        left_over = f"what was created could not be deleted ({seen.problem}): `posttrain stop` tries again"
        return _to(state, Action.QUIT, outcome=state.outcome or "failed", message=left_over)
    return _again(state, Action.DELETE, limits.queue_poll)


HANDLERS = {
    Action.CREATE: _create,
    Action.WATCH: _watch,
    Action.BOOTSTRAP: _bootstrap,
    Action.START: _start,
    Action.FOLLOW: _follow,
    Action.JUDGE: _judge,
    Action.HALT: _halt,
    Action.FETCH: _fetch,
    Action.DELETE: _delete,
    Action.QUIT: lambda state, _seen, _limits: state,
}
