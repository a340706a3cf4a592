"""The state machine of a launch, without a cloud: it has an answer for everything, and never forgets what exists."""

import dataclasses
import itertools
import json

import pytest

from posttrain.launch.tpu import lifecycle
from posttrain.launch.tpu.errors import classify
from posttrain.launch.tpu.lifecycle import Action, Host, Limits, Resource, Seen, State

PROBLEMS = [None] + [
    classify(text)
    for text in (
        "ssh exited with return code [255].", "There is no more capacity in the zone", "PERMISSION_DENIED", "what?",
        "UNAVAILABLE", "DeleteQueuedResource is not supported when state is PROVISIONING", "ALREADY_EXISTS",
        "posttrain-refused: no", "do not currently have an active account",
    )
]  # fmt: skip
STATES = (
    "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "FAILED", "SUSPENDING", "SUSPENDED",
    "DELETING", "SOMETHING_NEW",
)  # fmt: skip
RESOURCES = [None, *(Resource(state, initiator) for state in STATES for initiator in ("USER", "SERVICE"))]
HOSTS = [(), *(tuple(Host(f"w-{i}", *one) for i in range(2)) for one in (("running", 0), ("ended", 0), ("ended", 75),
         ("ended", 137), ("ended", 1), ("absent", 0)))]  # fmt: skip


def seen() -> list[Seen]:
    mixes = itertools.product(PROBLEMS, RESOURCES, HOSTS, [(), ("READY",), ("PREEMPTED",)])
    return [
        Seen(problem=problem, described=described, resource=resource, hosts=hosts, nodes=nodes, expected=2, now=5e4)
        for problem, resource, hosts, nodes in mixes
        for described in ((True, False) if resource is None else (True,))
    ]


@pytest.mark.parametrize("action", list(Action))
def test_there_is_an_answer_for_everything_and_nothing_is_forgotten(action):
    """A launch ends, or goes on, only with what exists on its record; it may be stored and read at any moment."""
    for one in seen():
        for tries, then, outcome in ((0, Action.CREATE, ""), (500, Action.CREATE, ""), (0, Action.QUIT, "failed")):
            state = State(next=action, exists=True, tries=tries, then=then, outcome=outcome, waiting_since=1.0)
            after = lifecycle.step(state, one, Limits(zones=2, tries=3))
            absent = one.described and one.resource is None
            refused = action == Action.CREATE and one.problem is not None
            if not after.exists:
                assert absent or refused, (one, after)
            if after.next == Action.CREATE:
                assert not after.exists or action == Action.CREATE, "created twice"
            if after.next == Action.QUIT and action != Action.QUIT:
                assert after.message or after.outcome == "done" or outcome
            json.dumps(dataclasses.asdict(after))


@pytest.mark.parametrize("action", list(Action))
def test_a_launch_that_was_left_goes_on_where_it_was(action):
    if action == Action.QUIT:
        return
    state = State(next=action, exists=True, preemptions=3, pause=30.0)
    again = lifecycle.resumed(lifecycle.left(state))
    assert (again.next, again.exists, again.preemptions, again.pause) == (action, True, 3, 0.0)
    assert lifecycle.resumed(state).next == action  # its process died


def test_ctrl_c_never_ends_a_program_that_runs():
    for action in (Action.FOLLOW, Action.JUDGE, Action.FETCH):
        after = lifecycle.interrupted(State(next=action, exists=True))
        assert (after.next, after.then, after.exists, after.outcome) == (Action.QUIT, action, True, "")
    for action in (Action.CREATE, Action.WATCH, Action.BOOTSTRAP, Action.START):
        after = lifecycle.interrupted(State(next=action, exists=True))
        assert (after.next, after.then, after.outcome) == (Action.DELETE, Action.QUIT, "stopped")


def test_a_slice_that_is_not_ready_while_its_queued_resource_is_active_is_lost():
    active = Seen(described=True, resource=Resource("ACTIVE"), nodes=("READY", "PREEMPTED"), now=1.0)
    after = lifecycle.step(State(next=Action.JUDGE, exists=True), active, Limits())
    assert (after.next, after.then, after.preemptions) == (Action.DELETE, Action.CREATE, 1)


def test_a_host_that_never_answers_again_is_a_lost_slice():
    state, looks = State(next=Action.JUDGE, exists=True), 0
    silent = Seen(described=True, resource=Resource("ACTIVE"), nodes=("READY",), hosts=(), expected=2)
    while state.next == Action.JUDGE:
        state, looks = lifecycle.step(state, silent, Limits(tries=5)), looks + 1
    assert (state.next, state.then, looks) == (Action.DELETE, Action.CREATE, 6)


def test_without_capacity_the_pauses_grow_to_a_limit():
    state, pauses = State(next=Action.CREATE), []
    refused = Seen(problem=classify("There is no more capacity in the zone"), now=1.0)
    for _ in range(10):
        state = lifecycle.step(state, refused, Limits(zones=2))
        pauses.append(state.pause)
    assert pauses == [0, 60, 0, 120, 0, 240, 0, 480, 0, 900]  # each zone once, then a rest
    assert {state.zone, lifecycle.step(state, refused, Limits(zones=2)).zone} == {0, 1}
